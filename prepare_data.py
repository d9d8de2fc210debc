"""Text or code -> a tokenizer and token files, in data/<dataset>. See gto/data.py for what is written.

    python prepare_data.py                                the standard library of this Python
    python prepare_data.py --input notes.txt src/"""
from gto.data import DEFAULT_VOCAB_SIZE, prepare
from gto.util import argument_parser, at_least, main_guard


def main():
    parser = argument_parser("python prepare_data.py", __doc__)
    parser.add_argument("--dataset", choices=("stdlib", "python"), default="stdlib", help="python: with site-packages")
    parser.add_argument("--input", nargs="+", metavar="PATH", help="your own files or directories of text or code")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: data/<dataset>, data/input)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--vocab-size", type=at_least(257), default=DEFAULT_VOCAB_SIZE, help="of the BPE trained here")
    either.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="one that exists: gpt2, its file, or its folder")
    args = parser.parse_args()
    out = args.out or f"data/{'input' if args.input else args.dataset}"
    meta = prepare(out, args.dataset, args.input, args.vocab_size, args.tokenizer)
    print(f"{out}: {meta['train_tokens']:,} tokens of {meta['train_documents']} documents to train on,"
          f" {meta['held_out_documents']} held out, of which prompts are cut, vocabulary {meta['vocab_size']:,}")


if __name__ == "__main__":
    main_guard(main)
