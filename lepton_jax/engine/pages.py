"""The pool of cache pages, with automatic reuse of pages that hold a known beginning of text.

Page 0 is the null page and is never given out. A page is free, referenced (by one row, or by
several that share its content), or cached: unreferenced but still holding registered tokens, the
first to go when pages run out, least recently used first. A page's key hashes its tokens and all
before them, so equal keys mean equal content. Who may share what is `scheduler.py`'s to decide.
"""

import array
import hashlib
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Reference-counted pages. All methods are O(pages touched).

    At any time every page but the null page is in exactly one of three states:
    free + cached + referenced = num_pages - 1.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}: want 2 or more, the null page and one to use")
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: want 1 or more tokens")
        self.page_size = page_size
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, oldest use first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` could give now."""
        return len(self._free) + len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def references(self, page: int) -> int:
        """How many rows hold a page."""
        return self._references[page]

    def keys(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The keys of the full pages of tokens; `known` are those of its first pages, if there."""
        size, keys = self.page_size, list(known)
        for start in range(len(keys) * size, len(tokens) - size + 1, size):
            digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
            digest.update(array.array("q", tokens[start : start + size]).tobytes())
            keys.append(digest.digest())
        return keys

    def known(self, keys: Sequence[bytes]) -> int:
        """How many pages hold the longest known beginning of these keys."""
        unknown = (place for place, key in enumerate(keys) if key not in self._page_of)
        return next(unknown, len(keys))

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """References and returns these pages."""
        pages = []
        for key in keys[: self.known(keys)]:
            page = self._page_of[key]
            self._references[page] += 1
            self._cached.pop(page, None)
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages, one reference each; None, with nothing changed, where there are fewer."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, key: bytes) -> None:
        """Says that a referenced page holds a key's content, once all that is dispatched has run.

        Where another page has the key already, that one stays the page to share.
        """
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference of each. The last pages of a text go first when room is needed."""
        for page in reversed(pages):
            if not self._references[page]:
                raise ValueError(f"page {page} was released more often than it was given out")
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
