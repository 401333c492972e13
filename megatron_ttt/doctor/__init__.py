"""What can be wrong before a run begins: the machine, the nodes' network, the files of a recipe,
and a trial of ten steps. `python -m megatron_ttt.doctor --help`; docs/multi_node.md."""
