"""Each headline figure beside its peer, both measured in the same run: `make benchmark [ONLY=name]`."""
