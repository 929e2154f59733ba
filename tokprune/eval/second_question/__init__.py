"""The second question: an image is compressed while one question is asked, and another one is asked
on the same cache.

In a conversation, and where a server keeps what an image left in the cache, tokens are chosen under
one question and must serve others. What that costs beside choosing anew is the *carry-over*
(:mod:`~tokprune.eval.second_question.measures`), after the protocol of multi-turn GQA
(MetaCompress, arXiv 2603.21701), with histories that are the same for every method.
"""
