"""Block maps of a conversation under the names of the guide, whose command lines and imports work here as written.

    python block_attention.py --mode real --model /path/to/model --json /path/to/data.json --use-gradient-checkpointing
    python block_attention.py --mode demo

    from block_attention import BlockAttentionAnalyzer

It is ``attnpatch analyze``; ``--help`` lists its options.
"""

import sys

from attnpatch import BlockAttentionAnalyzer
from attnpatch.__main__ import main

__all__ = ["BlockAttentionAnalyzer"]

if __name__ == "__main__":
    sys.argv.insert(1, "analyze")
    main()
