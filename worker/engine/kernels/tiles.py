"""Sizes that kernels are given."""


def power_of_two(number: int, smallest: int = 16) -> int:
    """The least power of two that is neither below `number` nor below `smallest`.

    16 is the smallest side of a matrix product.
    """
    return max(smallest, 1 << (number - 1).bit_length())
