"""The device mesh, sharding rules, the order of heads on devices, and exchanges of weights and their gradients."""
