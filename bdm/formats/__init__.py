"""The files of the English community: what they are, what their keys mean, and how they are written."""
