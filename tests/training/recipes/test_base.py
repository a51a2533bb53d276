from linear_run import LinearRecipe

from bdm.emoji.world import EmojiSource, World


def test_validation_reads_held_out_examples_alone():
    """The figures change when only those are replaced, and only then."""

    def source(held_out, limit=2):
        made = EmojiSource(World(), limit=limit)
        kept = type("Held", (), {"validation": held_out, "__len__": lambda _: len(made)})()
        type(kept).__getitem__ = lambda _, index: made[index]
        return kept

    one, other = (EmojiSource(World(), limit=2, groups=(group,)) for group in ("native", "shared"))
    recipe = LinearRecipe()
    recipe.source = source(one)
    before = recipe.validate()
    recipe.source = source(one, limit=4)
    assert recipe.validate() == before
    recipe.source = source(other)
    assert recipe.validate() != before
