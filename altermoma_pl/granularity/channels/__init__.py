"""Whole channels: which are coupled, which stay, and a smaller model without the others.

In the order of the work, each step with what it makes:

1. trace (`tracing`): a `Port` is one side of a layer; a `Coupling`, all ports that share channels.
2. lay out (`layouts`): a `Layout` says which positions make one channel; with it a coupling becomes a
   `ChannelGroup`, and each tensor in which its channels lie a `Slice` of it. So are groups that the user
   declares.
3. prove (`finding`): the groups of which half was removed on trial, without a change of the
   outputs, are the model's `Channels`; of all others they say why not.
4. score (`calibration`): one number for each channel.
5. keep (`widths`, `flops`): `Kept`, which channels stay at a share of them or of the FLOPs.
6. remove (`slimming`): a `Resizing` says what stays of each tensor, and `Slim` is the smaller model.
7. rebuild (`resizing`): the dense model's code and a checkpoint of the slim one give it again.

"Group" means coupled channels here and nothing else. Only a trial tells the truth: the graph is a guess.
"""
