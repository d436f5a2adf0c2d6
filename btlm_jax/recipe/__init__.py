"""The paper as data: configs, curriculum, muP, optimizer and learning rate."""
