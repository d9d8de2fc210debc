"""Text or code -> a tokenizer and token files, in data/<dataset>. See gto/data.py for what is written.

    python prepare_data.py                                the standard library of this Python
    python prepare_data.py --input notes.txt chats.jsonl src/
"""
from gto.data import DATASETS, DEFAULT_VOCAB_SIZE, prepare
from gto.util import UserError, argument_parser, main_guard


def main():
    parser = argument_parser("python prepare_data.py", __doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="stdlib",
                        help="stdlib: the standard library; python: with site-packages")
    parser.add_argument("--input", nargs="+", metavar="PATH", help="your own files or directories: text, code, "
                        'chat .jsonl with "text", "turns", "messages" or "conversations"')
    parser.add_argument("--out", metavar="DIR", help="where to write (default: data/<dataset>, data/input)")
    parser.add_argument("--vocab-size", type=int, metavar="N",
                        help=f"ids of the BPE trained here, end-of-text included (default: {DEFAULT_VOCAB_SIZE})")
    parser.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="use a tokenizer that exists: gpt2, "
                        "tokenizer.model, tokenizer.json, or a folder with one")
    args = parser.parse_args()
    if args.tokenizer and args.vocab_size:
        raise UserError("--vocab-size is for a tokenizer trained here: leave it out, or leave --tokenizer out")
    out = args.out or f"data/{'input' if args.input else args.dataset}"
    meta = prepare(out, args.dataset, args.input, args.vocab_size, args.tokenizer)
    print(f"{out}: {meta['train_tokens']:,} training tokens ({meta['train_documents']} documents), "
          f"{meta['val_tokens']:,} validation tokens ({meta['val_documents']} documents), "
          f"vocabulary {meta['vocab_size']:,}, {meta['chars_per_token']} characters per token")


if __name__ == "__main__":
    main_guard(main)
