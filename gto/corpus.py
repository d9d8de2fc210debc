"""From the machine to documents: lists of (name, text).

The name decides on which side of the split a document falls, so it never holds a path of the machine.
"""
import hashlib
import json
import os
import sysconfig
import urllib.request

from gto.errors import UserError

DATASETS = ("stdlib", "python", "shakespeare")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
# Tests and tables are code that nobody would complete by hand.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages",
                   "__pycache__"}
GENERATED_CHARS = 1_000_000         # a longer source file was written by a program


def collect(dataset, inputs=None, download_dir=None):
    """The documents of a built-in dataset, or of `inputs` (files and directories) if given. Sorted by name."""
    if inputs:
        documents = read_inputs(inputs)
    elif dataset == "shakespeare":
        documents = [("shakespeare.txt", download_shakespeare(download_dir))]
    else:
        documents = read_tree(sysconfig.get_paths()["stdlib"], "lib", SKIPPED_FOLDERS)
        if dataset == "python":
            for folder in sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}):
                documents += read_tree(folder, "site-packages", {"__pycache__"})
            by_content = {hashlib.sha256(text.encode()).digest(): (name, text)
                          for name, text in sorted(documents, reverse=True)}      # of copies the first name stays
            documents = list(by_content.values())
        if not documents:
            raise UserError("this interpreter has no standard library source; give text or code with --input")
    return sorted(document for document in documents if document[1].strip())


def read_tree(root, prefix, skipped):
    """The Python files below root, without folders named in `skipped`, generated files and what is not UTF-8."""
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in files:
            path = os.path.join(folder, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):    # that one describes the machine
                text = read_text(path)
                if text is not None and len(text) <= GENERATED_CHARS:
                    documents.append((f"{prefix}/{os.path.relpath(path, root)}".replace(os.sep, "/"), text))
    return documents


def read_text(path):
    """The file's text, or None if it cannot be read as UTF-8 text."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def read_inputs(paths):
    """Documents of text files, chat .jsonl files (a document per line) and directories of both."""
    documents = []
    for path in paths:
        if os.path.isdir(path):
            found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
            files = sorted(file for file in found if not is_hidden(os.path.relpath(file, path)))
        elif os.path.isfile(path):
            files = [path]
        else:
            raise UserError(f"--input {path}: no such file or directory")
        for file in files:
            text = read_text(file)
            if text is None:
                if file == path:
                    raise UserError(f"--input {path} cannot be read as UTF-8 text")
                continue
            name = os.path.relpath(file, os.path.dirname(os.path.abspath(path))).replace(os.sep, "/")
            if file.endswith(".jsonl"):
                lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
                documents += [(f"{name}:{i}", render_chat(line, f"{file}, line {i}")) for i, line in lines]
            else:
                documents.append((name, text))
    if not any(text.strip() for _, text in documents):
        raise UserError(f"--input {' '.join(map(str, paths))}: no text found")
    return documents


def is_hidden(path):
    return any(part.startswith(".") for part in path.split(os.sep))


def render_chat(line, where):
    """One line of a chat .jsonl as plain text, 'User: ...' and 'Assistant: ...'. `where` is for the error."""
    roles = {"human": "User", "gpt": "Assistant", "model": "Assistant"}
    turns = read_turns(line, where)
    if turns and turns[0][0] == "text":
        return turns[0][1]
    return "\n\n".join(f"{roles.get(role, role.capitalize())}: {text.strip()}" for role, text in turns) + "\n"


def read_turns(line, where):
    """One line of a chat .jsonl -> [(role, text)], roles as written. Knows "turns" (the user's), "messages"
    [{role, content}], ShareGPT's "conversations" [{from, value}]; "text" has the role "text"."""
    try:
        record = json.loads(line)
        if isinstance(record.get("text"), str):
            return [("text", record["text"])]
        if "messages" in record:
            turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
        elif "conversations" in record:
            turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        elif isinstance(record["turns"], list):
            turns = [("user", turn) for turn in record["turns"]]
        else:
            raise TypeError
        if all(isinstance(part, str) for turn in turns for part in turn):
            return turns
        raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{where}: expected an object with "text", "turns", "messages" or "conversations"') from None


def download_shakespeare(folder):
    path = os.path.join(folder, "shakespeare.txt")
    if not os.path.exists(path):
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=30) as response:
                content = response.read()
        except OSError as error:                                  # urllib's errors are OSErrors
            raise UserError(f"cannot download tiny Shakespeare ({error}): without a network, take the default dataset "
                            "or a text of your own with --input FILE") from None
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
        os.replace(f"{path}.tmp", path)
    return read_text(path)
