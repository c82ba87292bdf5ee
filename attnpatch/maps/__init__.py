"""Block maps: the data class, its checks, its file format, its table and its captions."""
