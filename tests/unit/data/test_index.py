"""Reading an index from storage that damages it on its way, or where it is replaced meanwhile."""

import pytest

from imaml_dist.data.index import FILE_NAME, READS, read_index
from imaml_dist.errors import ChangedError, DataError
from imaml_dist.storage.folder import Folder


class Flipping(Folder):
    """Flips a bit of the first answers; which one, decides what is wrong with the index: its form or its fingerprint."""

    def __init__(self, url, times, place):
        super().__init__(url)
        self.times, self.place, self.reads = times, place, 0

    def read(self, name, *args, **kwargs):
        content = bytearray(super().read(name, *args, **kwargs))
        self.reads += 1
        if self.reads <= self.times:
            content[content.index(self.place)] ^= 1
        return bytes(content)


class Replaced(Folder):
    """The index is replaced, by one that says the same, after each of the first looks at it."""

    def __init__(self, url, times):
        super().__init__(url)
        self.times, self.stats = times, 0

    def stat(self, name):
        found = super().stat(name)
        self.stats += 1
        if self.stats <= self.times:
            self.write(name, super().read(name))
        return found


@pytest.mark.parametrize(
    ("place", "says"), [(b"{", "is not a readable index"), (b"blobs", "the fingerprint says"), (b"imaml-", "format")]
)
def test_an_index_damaged_on_its_way_is_read_again(data, place, says):
    storage = Flipping(data, READS - 1, place)
    assert read_index(storage) == read_index(Folder(data))
    assert storage.reads == READS
    storage = Flipping(data, READS, place)
    with pytest.raises(DataError, match=says):
        read_index(storage)
    assert storage.reads == READS


def test_an_index_replaced_while_it_is_read_is_looked_at_again(data, tmp_path):
    (tmp_path / FILE_NAME).write_bytes((data / FILE_NAME).read_bytes())
    assert read_index(Replaced(tmp_path, READS - 1)) == read_index(Folder(data))
    with pytest.raises(ChangedError, match="changed since it was first looked at"):
        read_index(Replaced(tmp_path, READS))


def test_a_missing_index_is_looked_for_once(tmp_path):
    storage = Flipping(tmp_path, 0, b"")
    with pytest.raises(DataError, match=f"has no {FILE_NAME}; check the URL"):
        read_index(storage)
    assert storage.reads == 0
