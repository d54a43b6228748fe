"""The same image files in every layout that a source reads."""

import io
import json
import tarfile
import zipfile

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from simmim.config import compose_config
from simmim.data.folder import FolderSource
from simmim.data.shards import PreparedImage, shard_path, write_index, write_shard


def tar(path, members, links=()):
    """An archive, compressed as its name says, of (name, content) and of links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    return path


def zipped(path, members, method=zipfile.ZIP_STORED):
    """A .zip of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def rows(path, images, labels=None, names=()):
    """A data set on the disk, of image files as bytes."""
    content = {"image": [{"bytes": image, "path": None} for image in images], "note": ["-"] * len(images)}
    features = {"image": datasets.Image(), "note": Value("string")}
    if labels is not None:
        content["label"], features["label"] = labels, ClassLabel(names=list(names))
    Dataset.from_dict(content, features=Features(features)).save_to_disk(path)
    return path


def rows_of_paths(path, paths, labels, names):
    """As older versions saved them: the files stay where they lie. Today's would read them all in."""
    struct = {"bytes": Value("binary"), "path": Value("string")}
    content = {"image": [{"bytes": None, "path": str(one)} for one in paths], "label": labels}
    features = Features({"image": struct, "label": ClassLabel(names=list(names))})
    DatasetDict({"train": Dataset.from_dict(content, features=features)}).save_to_disk(path)
    info = path / "train" / "dataset_info.json"
    said = json.loads(info.read_text())
    said["features"]["image"] = {"_type": "Image"}
    info.write_text(json.dumps(said))
    return path


class Layouts:
    """Every layout of the files below a folder, in which the first-level folders are the classes.

    Each method gives the settings that read it. The members of archives are shuffled: the order is by name.
    """

    def __init__(self, photos, place):
        self.photos, self.place = photos, place
        source = FolderSource(photos)
        self.classes = source.classes
        self.names = [source.relative_name(index) for index in range(len(source))]
        self.labels = [source.label(index) for index in range(len(source))]
        self.files = [(photos / name).read_bytes() for name in self.names]
        self.shuffled = sorted(zip(self.names, self.files, self.labels, strict=True), key=lambda entry: entry[0][::-1])

    def folder(self):
        return ["data=folder", f"data.root={self.photos}"]

    def copy(self):
        """As `simmim.prepare` packs files that are small and upright: as they are."""
        out = self.place / "copy"
        entries = zip(self.names, self.files, self.labels, strict=True)
        images, records = iter([PreparedImage(name, label, data) for name, data, label in entries]), []
        while sum(record["taken"] for record in records) < len(self.names):
            records.append(write_shard(shard_path(out, len(records)), images, 200_000))
        write_index(out, records, self.classes, listed=len(self.names), short_side=4096)
        return ["data=shards", f"data.root={out}"]

    def webdataset(self, ending=".tar"):
        entries = sorted(self.shuffled)  # archives follow one another by name, so that the order can be the folder's
        third = len(entries) // 3 + 1
        for number in range(3):
            part = entries[number * third : (number + 1) * third][::-1]
            members = [
                pair
                for name, data, label in part
                for pair in ((f"{name.rpartition('.')[0]}.cls", b"%d" % label), (name, data))
            ]
            tar(self.place / f"web{ending}" / f"t-{number:03d}{ending}", members)
        return ["data=shards", f"data.root='{self.place}/web{ending}/t-{{000..002}}{ending}'"]

    def webdataset_gz(self):
        return self.webdataset(".tar.gz")

    def archive_a_class(self):
        """As ImageNet-22K."""
        for name in self.classes:
            members = [(n.rpartition("/")[2], data) for n, data, _ in self.shuffled if n.startswith(f"{name}/")]
            tar(self.place / "classes" / f"{name}.tar", members)
        return ["data=shards", "data.labels=archive", f"data.root={self.place}/classes"]

    def zip_with_map(self, method=zipfile.ZIP_STORED):
        """As ImageNet for Swin Transformer."""
        path = zipped(self.place / f"map{method}" / "train.zip", [(n, data) for n, data, _ in self.shuffled], method)
        lines = "".join(f"{name}\t{label}\n" for name, _, label in self.shuffled)
        path.with_name("train_map.txt").write_text(lines)
        return ["data=zip", f"data.root={path}"]

    def zip_deflated(self):
        return self.zip_with_map(zipfile.ZIP_DEFLATED)

    def zip_of_folders(self):
        members = [(f"photos/{name}", data) for name, data, _ in self.shuffled]
        return ["data=zip", f"data.root={zipped(self.place / 'photos.zip', members)}"]

    def hf(self):
        return ["data=hf", f"data.root={rows(self.place / 'hf', self.files, self.labels, self.classes)}"]

    def hf_paths(self):
        paths = [self.photos / name for name in self.names]
        return ["data=hf", f"data.root={rows_of_paths(self.place / 'paths', paths, self.labels, self.classes)}"]

    def list_of_names(self):
        lines = [f"{self.photos / name}\t{self.classes[label]}" for name, _, label in self.shuffled]
        (self.place / "names.txt").write_text("\n".join(lines))
        return ["data=list", f"data.root={self.place}/names.txt"]

    def list_of_numbers(self):
        (self.place / "here").symlink_to(self.photos)
        lines = [f"here/{name}\t{label}\r\n" for name, _, label in self.shuffled]
        (self.place / "numbers.txt").write_bytes("".join(lines).encode())
        return ["data=list", f"data.root={self.place}/numbers.txt"]


LAYOUTS = [name for name in vars(Layouts) if not name.startswith("_")]


def settings(words):
    """The `data` section for these settings."""
    return compose_config("pretrain", [*words, "data.num_workers=0"], output_dir="unused")["data"]
