"""Fast paths of decoding on latents: one query position over a long cache.

Both take a layer's projected queries and its rows, and give outputs in the value side's
coordinates, ready for the layer's `output` maps. `matkv.attention` chooses.
"""
