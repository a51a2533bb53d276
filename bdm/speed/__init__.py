"""The same picture with less work; and, where it is asked for, another one with less still."""
