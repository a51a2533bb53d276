"""The paper (arXiv 2309.00952): the branch, and the bridge that joins it to the backbone's UNet."""
