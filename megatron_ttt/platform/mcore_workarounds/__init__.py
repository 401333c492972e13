"""Where the package changes what megatron-core, or torch on its behalf, does on every device.

All of it: no module outside `megatron_ttt/platform/` assigns a class, replaces an attribute or
subclasses a part of megatron-core whose behaviour it has to change. (`platform/cpu.py` holds what
the CPU alone needs.) Each workaround says, in this form:

    Seen in: the versions of megatron-core, or of torch, that were tried
    Symptom: what goes wrong without it
    Upstream: the issue, where there is one
    Done: what is changed

`tests/test_mcore_workarounds.py` shows each symptom with megatron-core's own objects. A test that
fails there with "fixed upstream: remove NAME" names a workaround that is no longer needed.
"""
