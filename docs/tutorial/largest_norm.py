from tokprune.methods import PromptScorer, register_method


@register_method
class LargestNorm(PromptScorer):
    """Keep the tokens with the largest norm."""

    name = "largest-norm"

    def score(self, image):
        return image.features.norm(dim=-1)
