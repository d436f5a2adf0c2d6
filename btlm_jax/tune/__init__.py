"""Checking and tuning the parametrization: the coordinate check and its mutations."""
