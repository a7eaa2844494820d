"""Building blocks of the example models."""

from torch import Tensor, nn

# Few steps of training: running statistics must settle within about 100 of them.
NORM_EPS = 1e-3
NORM_MOMENTUM = 0.1


def norm2d(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation of maps."""
    return nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=NORM_MOMENTUM)


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the size (up to the stride), BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        norm2d(outputs),
        nn.ReLU(),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual connection.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(inputs, outputs, stride=stride)
        self.conv2 = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), norm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        return self.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


def residual_stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` residual blocks, the first with the stride."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def plain_stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` plain convolutions, the first with the stride."""
    first = conv_norm_relu(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(conv_norm_relu(outputs, outputs) for _ in range(blocks - 1)))
