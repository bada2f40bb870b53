"""A Flower app that only carries a payload to each device and back."""
