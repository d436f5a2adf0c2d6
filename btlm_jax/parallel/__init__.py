"""The device mesh, sharding rules, collectives, and the order of heads on devices."""
