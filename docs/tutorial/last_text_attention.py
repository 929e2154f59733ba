from tokprune.methods import DecoderScorer, register_method


@register_method
class LastTextAttention(DecoderScorer):
    """Keep the tokens that the last text token attends to most."""

    name = "last-text-attention"

    def score(self, attention, sequence):
        return attention.rows(sequence.last_row()).mean((1, 2))
