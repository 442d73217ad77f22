#!/usr/bin/env python3
"""Build the training corpus of the demo model from documentation that Debian packages carry.

Needs a Debian 12 system with apt-get, dpkg and mandoc; nothing but the Python standard library.

    python3 scripts/build_demo_corpus.py --out DIR

writes
    DIR/train-NN.txt.xz   training documents, separated by a line holding only U+001E
    DIR/heldout.txt       whole documents that never enter training (permissive licences only)
    DIR/calibration.txt   whole training documents, for calibrating a change of basis
    DIR/heldout.json      the same held-out documents one by one, with package, path and licence
    DIR/manifest.json     packages, versions, licences, documents and bytes per family

The result depends on the package versions of the mirror and on nothing else: documents are ordered and chosen by the
SHA-256 of their identity.
"""

import argparse
import collections
import gzip
import hashlib
import html
import json
import lzma
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys

SEPARATOR = "\n\x1e\n"
SHARDS = 8
MB = 1_000_000

# family: packages, licence, permissive (may be shipped as held-out or calibration text), cap in MB of cleaned text,
# and a path filter. Licences as stated in /usr/share/doc/PACKAGE/copyright.
FAMILIES = [
    ("man-pages", ["manpages", "manpages-dev"], "Linux man-pages licences (verbatim, BSD, GPL-2+)", False, 9, None),
    ("linux", ["linux-doc-6.1"], "GPL-2.0", False, 22, r"/html/.*\.html$"),
    ("postgresql", ["postgresql-doc-15"], "PostgreSQL", True, 12, r"\.html$"),
    ("debian", ["debian-policy", "developers-reference", "debian-reference-en", "debmake-doc", "installation-guide-amd64",
                "debian-handbook", "apt", "dpkg", "dpkg-dev"],
     "GPL-2+, CC-BY-SA-3.0 (handbook), Expat (debmake-doc)", False, 9,
     r"(policy\.html/|developers-reference/|debian-reference/.*\.en\.html$|debmake-doc/.*\.en\.html$|/en/.*\.html$|en\.amd64/"
     r"|en-US/|/man/man\d)"),
    ("python", ["python3.11-doc"], "PSF-2.0", True, 12, r"html/(?!genindex|search|_).*\.html$"),
    ("perl", ["perl-doc"], "GPL-1+ or Artistic-1.0", False, 8, r"/man/man\d"),
    ("git", ["git-man", "git-doc"], "GPL-2.0", False, 5, r"(/man/man\d|RelNotes|howto/.*\.html$|technical/.*\.html$)"),
    ("core-man", ["coreutils", "systemd", "lvm2", "zsh-common"], "GPL-3+, LGPL-2.1+, GPL-2, Zsh", False, 6, r"/man/man\d"),
    ("openssl", ["openssl", "libssl-doc"], "Apache-2.0", True, 5, r"/man/man\d"),
    ("openmpi", ["openmpi-doc"], "BSD-3-Clause", True, 3, r"/man/man\d"),
    ("freebsd-man", ["freebsd-manpages"], "BSD-2-Clause, BSD-4-Clause-UC", True, 9, r"/man/man\d"),
    ("curl", ["libcurl4-doc"], "curl (MIT-like)", True, 2, r"/man/man\d"),
    ("apache", ["apache2-doc"], "Apache-2.0", True, 5, r"/manual/en/.*\.html$"),
    ("tomcat", ["tomcat10-docs"], "Apache-2.0", True, 3, r"\.html$"),
    ("openstack", ["nova-doc", "neutron-doc", "cinder-doc", "keystone-doc", "glance-doc"], "Apache-2.0", True, 12,
     r"html/(?!_|genindex|search|py-modindex|api/|.*sample).*\.html$"),
    ("rust", ["rust-doc"], "MIT or Apache-2.0", True, 12,
     r"html/(book|reference|nomicon|rust-by-example|cargo|rustc|rustdoc|edition-guide|embedded-book|std/[^/]+/(?!index)[^/]*)"
     r".*\.html$"),
    ("erlang", ["erlang-doc"], "Apache-2.0", True, 12, r"\.html$"),
    ("django", ["python-django-doc"], "BSD-3-Clause", True, 6, r"html/(?!_|genindex|search).*\.html$"),
    ("pandas", ["python-pandas-doc"], "BSD-3-Clause", True, 6, r"html/(?!_|genindex|search).*\.html$"),
    ("scipy", ["python-scipy-doc"], "BSD-3-Clause", True, 8, r"html/(?!_|genindex|search).*\.html$"),
    ("sklearn", ["python-sklearn-doc"], "BSD-3-Clause", True, 7, r"html/(?!_|genindex|search).*\.html$"),
    ("statsmodels", ["python-statsmodels-doc"], "BSD-3-Clause", True, 3, r"html/(?!_|genindex|search).*\.html$"),
    ("sympy", ["python-sympy-doc"], "BSD-3-Clause", True, 5, r"html/(?!_|genindex|search).*\.html$"),
    ("sqlalchemy", ["python-sqlalchemy-doc"], "MIT", True, 6, r"html/(?!_|genindex|search).*\.html$"),
    ("celery", ["python-celery-doc"], "CC-BY-SA-4.0 (documentation), BSD-2-Clause (docstrings)", True, 3, r"html/(?!_|genindex|search).*\.html$"),
    ("sphinx", ["sphinx-doc"], "BSD-2-Clause", True, 2, r"html/(?!_|genindex|search).*\.html$"),
    ("llvm", ["llvm-14-doc", "clang-14-doc"], "Apache-2.0 WITH LLVM-exception", True, 9,
     r"html/(?!_|genindex|search).*\.html$"),
    ("cmake", ["cmake-doc"], "BSD-3-Clause", True, 5, r"html/(?!_|genindex|search).*\.html$"),
    ("sqlite", ["sqlite3-doc"], "public domain", True, 8, r"\.html$"),
    ("bind9", ["bind9-doc"], "MPL-2.0", False, 2, r"\.html$"),
    ("slurm", ["slurm-wlm-doc"], "GPL-2+", False, 3, r"\.html$"),
    ("postfix", ["postfix-doc"], "IPL-1.0 or EPL-2.0", False, 4, r"\.html$"),
    ("dpdk", ["dpdk-doc"], "BSD-3-Clause", True, 6, r"guides/.*\.html$"),
    ("openvswitch", ["openvswitch-doc"], "Apache-2.0", True, 3, r"html/(?!_|genindex|search).*\.html$"),
    ("haproxy", ["haproxy-doc"], "GPL-2+", False, 3, r"\.html$"),
    ("varnish", ["varnish-doc"], "BSD-2-Clause", True, 3, r"html/(?!_|genindex|search).*\.html$"),
    ("nodejs", ["nodejs-doc"], "MIT", True, 4, r"api/.*\.html$"),
    ("cargo", ["cargo-doc"], "MIT or Apache-2.0", True, 2, r"\.html$"),
    ("mercurial", ["mercurial-common"], "GPL-2+", False, 2, r"\.txt(\.gz)?$|/man/man\d"),
]

# Families whose reference pages are generated from one template are left out of the held-out set.
HELDOUT_FAMILIES = ["postgresql", "python", "openssl", "freebsd-man", "apache", "openstack", "rust", "erlang", "django",
                    "scipy", "sklearn", "sqlalchemy", "llvm", "cmake", "sqlite", "dpdk", "openvswitch", "varnish", "tomcat",
                    "curl", "celery", "nodejs"]

DROPPED_ELEMENTS = re.compile(
    r"<(script|style|nav|head|header|footer|svg|math|button|form|select|noscript)\b.*?</\1\s*>", re.S | re.I)
COMMENTS = re.compile(r"<!--.*?-->", re.S)
HEADER_LINKS = re.compile(r"<a\b[^>]*>(?:[^<A-Za-z]{0,3}|\[?(?:source|src|link)\]?)(?:<[^>/]*>\s*</[^>]*>)*</a>", re.S)
MAIN_START = re.compile(
    r'<main\b|<div[^>]*\brole="main"|<div[^>]*class="body"|<div[^>]*itemprop="articleBody"|<article\b'
    r'|<div[^>]*id="(?:page-content|content|apicontent|mainBody)"|<div[^>]*class="(?:manual-text|chapter|sect1|refentry)"', re.I)
MAIN_END = re.compile(
    r'</main>|<div[^>]*class="(?:sphinxsidebar|navfooter|bottomlang|clearer|related|sphinxsidebarwrapper|rst-footer-buttons'
    r'|prev-next|page-source)|<table class="foot"|<div[^>]*id="(?:footer|comments_section)"|<h3>Navigation|<hr class="?footer',
    re.I)
NAV_BLOCKS = re.compile(r'<div[^>]*class="(?:navheader|navfooter|nosearch|toolbar|toclink|breadcrumb|toc|contents|top)[^"]*".*?</div>',
                        re.S | re.I)
PRE = re.compile(r"(<pre\b.*?</pre\s*>)", re.S | re.I)
PARAGRAPH_TAGS = re.compile(r"</?(?:p|h[1-6]|table|div|section|ul|ol|dl|blockquote|title|body|article|main)\b[^>]*>", re.I)
LINE_TAGS = re.compile(r"<(?:br|dt|dd|tr)\b[^>]*>", re.I)
ITEM_TAGS = re.compile(r"<li\b[^>]*>", re.I)
CELL_ENDS = re.compile(r"</t[dh]>", re.I)
TAGS = re.compile(r"<[^>]*>")
ASCII_FORMS = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2010": "-", "\u2011": "-",
    "\u2212": "-", "\u00a0": " ", "\u2026": "...", "\u2022": "-", "\u00b6": "", "\u00ad": "", "\u200b": "", "\ufeff": "",
    "\u2192": "->", "\u00b7": "-", "\uf0c1": "", "\u2002": " ", "\u2003": " ", "\u2009": " ", "\x1e": "", "\x0c": "\n",
})


def html_to_text(source):
    source = COMMENTS.sub("", source)
    source = DROPPED_ELEMENTS.sub(" ", source)
    start = MAIN_START.search(source)
    if start:
        source = source[start.start():]
    end = MAIN_END.search(source, 64)
    if end:
        source = source[:end.start()]
    source = HEADER_LINKS.sub("", NAV_BLOCKS.sub(" ", source))
    parts = []
    for part in PRE.split(source):
        if part[:4].lower() == "<pre":
            text = html.unescape(TAGS.sub("", part)).expandtabs(4)
            parts.append("\n\n" + "\n".join(line.rstrip() for line in text.strip("\n").split("\n")) + "\n\n")
            continue
        part = re.sub(r"\s+", " ", part)
        part = PARAGRAPH_TAGS.sub("\n\n", part)
        part = ITEM_TAGS.sub("\n- ", LINE_TAGS.sub("\n", part))
        part = TAGS.sub("", CELL_ENDS.sub("  ", part))
        parts.append("\n".join(line.strip() for line in html.unescape(part).split("\n")))
    return "".join(parts)


def clean(text):
    text = text.translate(ASCII_FORMS).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"\n-[ \t]*\n+", "\n- ", text)
    text = "".join(c for c in text if c == "\n" or c == "\t" or ord(c) >= 32)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_man_page(path):
    return re.search(r"/man/man\d\w*/[^/]+$", path) is not None


def read_document(job):
    """(family, package, path) -> cleaned text, or '' where the file is not usable prose."""
    _, root, path = job
    full = os.path.join(root, path)
    if os.path.islink(full) or not os.path.isfile(full):
        return ""
    raw = gzip.open(full).read() if full.endswith(".gz") else open(full, "rb").read()
    if is_man_page(path):
        if len(raw) < 400 or raw[:4] == b".so ":
            return ""
        done = subprocess.run(["mandoc", "-T", "html", "-O", "fragment"], input=raw, capture_output=True, timeout=60)
        text = html_to_text(done.stdout.decode("utf-8", "replace"))
    else:
        text = raw.decode("utf-8", "replace")
        if "<" in text[:4000] and re.search(r"<(html|!doctype|body|div)", text[:8000], re.I):
            text = html_to_text(text)
    text = clean(text)
    if len(text) < 500 or text.count("\ufffd") > 3:
        return ""
    if sum(ord(c) > 126 for c in text) > 0.03 * len(text):
        return ""
    letters = sum(c.isalpha() or c == " " for c in text)
    return text if letters > 0.62 * len(text) else ""


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:12]


def fetch_packages(work):
    deb, root = work / "deb", work / "root"
    deb.mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    versions = {}
    for name in sorted({p for family in FAMILIES for p in family[1]}):
        if not list(deb.glob(name + "_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", name], cwd=deb, check=True, stderr=subprocess.DEVNULL)
        package = sorted(deb.glob(name + "_*.deb"))[-1]
        if not (root / name).is_dir():
            subprocess.run(["dpkg", "-x", str(package), str(root / name)], check=True)
        versions[name] = subprocess.run(["dpkg-deb", "-f", str(package), "Version"], capture_output=True, text=True,
                                        check=True).stdout.strip()
    return root, versions


def list_jobs(root):
    jobs = []
    for family, packages, _, _, _, pattern in FAMILIES:
        for package in packages:
            base = root / package
            for folder, _, names in os.walk(base):
                for name in names:
                    path = os.path.relpath(os.path.join(folder, name), base)
                    if re.search(r"/man/[a-z]{2}(_[A-Z]{2})?/", "/" + path) or not path.startswith("usr/share"):
                        continue
                    if re.search(pattern or r"/man/man\d", "/" + path) and "/copyright" not in path:
                        jobs.append((family, str(base), path))
    return jobs


def drop_boilerplate(documents):
    """Remove lines that more than 4 % of a family's documents share (navigation, banners, generated footers)."""
    counts = collections.defaultdict(collections.Counter)
    totals = collections.Counter()
    for doc in documents:
        totals[doc["family"]] += 1
        counts[doc["family"]].update({line for line in doc["text"].split("\n") if 3 < len(line) < 400})
    for doc in documents:
        limit = max(12, 0.04 * totals[doc["family"]])
        shared = counts[doc["family"]]
        kept = [line for line in doc["text"].split("\n")
                if shared[line] <= limit or (is_man_page(doc["path"]) and re.fullmatch(r"[A-Z ]{4,24}", line))]
        doc["text"] = clean("\n".join(kept))


def paragraphs(text):
    return text.split("\n\n")


def numeric_noise(paragraph):
    return len(paragraph) > 160 and sum(c.isalpha() or c == " " for c in paragraph) < 0.55 * len(paragraph)


def deduplicate(documents):
    """Keep the first occurrence of every paragraph of 80 characters or more."""
    seen = set()
    for doc in documents:
        kept, dropped = [], 0
        for paragraph in paragraphs(doc["text"]):
            if numeric_noise(paragraph):
                dropped += len(paragraph)
                continue
            if len(paragraph) >= 80:
                key = digest(re.sub(r"\W+", " ", paragraph.lower()))
                if key in seen:
                    dropped += len(paragraph)
                    continue
                seen.add(key)
            kept.append(paragraph)
        doc["unique"] = 1 - dropped / max(1, len(doc["text"]))
        doc["text"] = clean("\n\n".join(kept))
    return [doc for doc in documents if len(doc["text"]) > 500 and doc["unique"] > 0.3]


def prose_share(text):
    lines = [line for line in text.split("\n") if line]
    return sum(len(line) for line in lines if len(line) > 100) / max(1, sum(len(line) for line in lines))


def grams(text, n=13):
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i:i + n])) for i in range(0, max(0, len(words) - n))}


def choose(documents, families, want_bytes, low, high, taken):
    """Round-robin over families by document digest, so that every family is represented."""
    queues = {f: [d for d in documents if d["family"] == f and id(d) not in taken and low < len(d["text"]) < high
                  and prose_share(d["text"]) > 0.55 and d["unique"] > 0.8] for f in families}
    chosen, size = [], 0
    while size < want_bytes and any(queues.values()):
        for family in families:
            if queues[family] and size < want_bytes:
                doc = queues[family].pop(0)
                chosen.append(doc)
                size += len(doc["text"])
    return chosen


def write_shard(path, texts):
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as out:
        out.write(SEPARATOR.join(texts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, help="where packages are unpacked (default: OUT/work)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    work = (args.work or args.out / "work").resolve()
    args.out.mkdir(parents=True, exist_ok=True)

    root, versions = fetch_packages(work)
    jobs = list_jobs(root)
    print(f"{len(jobs)} files", file=sys.stderr)
    with multiprocessing.Pool(args.jobs) as pool:
        texts = pool.map(read_document, jobs, chunksize=32)
    documents = [{"family": f, "package": os.path.basename(base), "path": path, "text": text}
                 for (f, base, path), text in zip(jobs, texts) if text]
    documents.sort(key=lambda d: digest(d["package"] + d["path"]))
    drop_boilerplate(documents)
    documents = deduplicate(documents)

    caps = {family[0]: family[4] * MB for family in FAMILIES}
    used = collections.Counter()
    kept = []
    for doc in documents:
        if used[doc["family"]] < caps[doc["family"]]:
            used[doc["family"]] += len(doc["text"])
            kept.append(doc)
    documents = kept

    # Candidates for the held-out set must share almost no 13-word sequence with anything else.
    candidates = choose(documents, HELDOUT_FAMILIES, 600_000, 4_000, 16_000, set())
    taken = {id(d) for d in candidates}
    candidate_grams = [grams(d["text"]) for d in candidates]
    wanted = set().union(*candidate_grams)
    training_hits = set()
    for doc in documents:
        if id(doc) not in taken:
            training_hits |= grams(doc["text"]) & wanted
    heldout, size = [], 0
    for doc, own in zip(candidates, candidate_grams):
        doc["overlap"] = len(own & training_hits) / max(1, len(own))
        if doc["overlap"] < 0.02 and size < 230_000:
            heldout.append(doc)
            size += len(doc["text"])
    held = {id(d) for d in heldout}
    train = [d for d in documents if id(d) not in taken]
    calibration = choose(train, HELDOUT_FAMILIES, 190_000, 4_000, 16_000, held)

    with multiprocessing.Pool(args.jobs) as pool:
        pool.starmap(write_shard, [(args.out / f"train-{i:02d}.txt.xz", [d["text"] for d in train[i::SHARDS]])
                                   for i in range(SHARDS)])
    (args.out / "heldout.txt").write_text("\n\n".join(d["text"] for d in heldout) + "\n")
    (args.out / "calibration.txt").write_text("\n\n".join(d["text"] for d in calibration) + "\n")
    licences = {family[0]: family[2] for family in FAMILIES}
    describe = lambda d: {"package": d["package"], "path": d["path"], "licence": licences[d["family"]], "bytes": len(d["text"].encode())}
    (args.out / "heldout.json").write_text(json.dumps([{**describe(d), "text": d["text"]} for d in heldout]))
    families = {}
    for family, packages, licence, permissive, _, _ in FAMILIES:
        mine = [d for d in train if d["family"] == family]
        families[family] = {"packages": {p: versions[p] for p in packages}, "licence": licence, "documents": len(mine),
                            "bytes": sum(len(d["text"].encode()) for d in mine)}
    manifest = {"families": families, "train_documents": len(train), "train_bytes": sum(f["bytes"] for f in families.values()),
                "heldout": [describe(d) for d in heldout], "calibration": [describe(d) for d in calibration],
                "heldout_rule": "whole documents; less than 2 % of their 13-word sequences occur in training text"}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for family, numbers in families.items():
        print(f"{family:14s} {numbers['documents']:6d} documents {numbers['bytes'] / MB:7.2f} MB", file=sys.stderr)
    print(f"train {len(train)} documents, {manifest['train_bytes'] / MB:.1f} MB; held out {len(heldout)}, {size} characters",
          file=sys.stderr)


if __name__ == "__main__":
    main()
