mlp_forward = mlp_backward = None
