"""Block maps of conversations, as a script: the same as ``attnpatch analyze``. ``--help`` lists the options.

    python block_attention.py --mode real --model /path/to/model --json /path/to/data.json --use-gradient-checkpointing
    python block_attention.py --mode demo

The class can be imported from here too:

    from block_attention import BlockAttentionAnalyzer
"""

import sys

from attnpatch import BlockAttentionAnalyzer
from attnpatch.__main__ import main

__all__ = ["BlockAttentionAnalyzer"]

if __name__ == "__main__":
    sys.argv.insert(1, "analyze")
    main()
