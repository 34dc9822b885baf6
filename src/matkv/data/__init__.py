"""Text in, batches out."""

from matkv.data.articles import default_articles
from matkv.data.chats import chat_examples, read_chats
from matkv.data.texts import read_texts
from matkv.data.windows import batches, text_windows, token_stream, windows

__all__ = [
    "batches",
    "chat_examples",
    "default_articles",
    "read_chats",
    "read_texts",
    "text_windows",
    "token_stream",
    "windows",
]
