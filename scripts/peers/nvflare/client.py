"""A device: sends back as much as it got."""

import nvflare.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    params = {name: value + 1 for name, value in model.params.items()}
    flare.send(flare.FLModel(params=params, metrics={"loss": 0.0}))
