//! The pretraining corpus: rows against the rings of tokens they are cut from, the cache, held-out documents,
//! and invalid sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use quantune::data::Batch;
use quantune::data::corpus::{Corpus, CorpusSettings, SourceSpec};
use quantune::ops::Segment;
use quantune::text::{Special, Tokenizer, first_second};
use serde_json::json;

use crate::support::golden;

static GOES_ON: AtomicBool = AtomicBool::new(false);

/// A folder with sources, their cache and a tokenizer.
struct Room {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Room {
    fn new() -> Self {
        let tokenizer = Tokenizer::from_folder(golden("model/llama-tiny")).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), tokenizer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn settings(&self, sequence_length: usize) -> CorpusSettings {
        CorpusSettings {
            cache: self.path("cache"),
            sequence_length,
            reset_at_borders: false,
            validation_split: 0.0,
            seed: 7,
        }
    }

    /// Opens sources `NAME=WEIGHT:GLOB` inside the folder; also returns the number of progress reports.
    fn try_open(
        &self,
        sources: &[&str],
        settings: &CorpusSettings,
    ) -> Result<(Corpus, usize), String> {
        let folder = format!("{}/", self.folder.path().display());
        let spec = |source: &&str| source.replacen(':', &format!(":{folder}"), 1).parse();
        let specs: Vec<SourceSpec> = sources.iter().map(spec).collect::<Result<_, _>>()?;
        let mut reports = 0;
        Corpus::open(&specs, &self.tokenizer, settings, &GOES_ON, |_| reports += 1)
            .map(|corpus| (corpus, reports))
            .map_err(|error| error.to_string().replace(&folder, ""))
    }

    fn open(&self, sources: &[&str], settings: &CorpusSettings) -> Corpus {
        self.try_open(sources, settings).unwrap().0
    }

    /// Documents concatenated, each with its end-of-text token.
    fn ring(&self, documents: &[String]) -> Vec<u32> {
        let encode = |document: &String| {
            let mut tokens = self.tokenizer.encode(document, Special::AsText).unwrap();
            tokens.push(0);
            tokens
        };
        documents.iter().flat_map(encode).collect()
    }
}

/// Documents of different lengths and with different beginnings.
fn documents(count: usize) -> Vec<String> {
    let document = |i: usize| format!("{i}. number <|im_end|> {}", "goes é on. ".repeat(i % 5));
    (0..count).map(document).collect()
}

fn text_file(documents: &[String]) -> String {
    documents.join("\n<|endoftext|>\n")
}

fn jsonl(documents: &[String]) -> String {
    documents.iter().map(|text| format!("{}\n", json!({ "text": text, "id": [1] }))).collect()
}

/// A Parquet file with a null after every document, in groups of ten rows.
fn parquet(documents: &[impl AsRef<[u8]>], schema: &str, compression: Compression) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut bytes = Vec::new();
    let mut file = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    for documents in documents.chunks(5) {
        let mut group = file.next_row_group().unwrap();
        while let Some(mut column) = group.next_column().unwrap() {
            let values: Vec<ByteArray> =
                documents.iter().map(|text| text.as_ref().to_vec().into()).collect();
            let levels: Vec<i16> = documents.iter().flat_map(|_| [1, 0]).collect();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    file.close().unwrap();
    bytes
}

const SCHEMA: &str = "message rows { optional binary title (UTF8); optional binary text (UTF8); }";

/// Every row of two epochs is the slice of the ring at its position, and an epoch uses no token twice.
fn check_rows(corpus: &Corpus, ring: &[u32], length: usize) {
    let rows = corpus.rows_per_epoch(0);
    assert_eq!(rows, (ring.len() / length).max(1) as u64);
    let mut orders = BTreeSet::new();
    for epoch in 0..2 {
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        for row in epoch * rows..(epoch + 1) * rows {
            let place = corpus.place(row);
            assert_eq!((place.source, place.epoch), (0, epoch));
            let at = |i: usize| ring[(place.start as usize + i) % ring.len()];
            let batch = corpus.batch(row..row + 1);
            assert_eq!(batch.tokens, (0..length).map(at).collect::<Vec<_>>());
            let targets = (0..length).map(|i| (i as u32, at(i + 1)));
            assert_eq!(batch.targets, targets.collect::<Vec<_>>());
            assert_eq!(batch.keys, (0..length as u32).map(|i| (row, i)).collect::<Vec<_>>());
            let places = (0..length).map(|i| (place.start as usize + i) % ring.len());
            seen.extend(places);
            order.push(place.start);
        }
        assert_eq!(seen.len(), ring.len().min(rows as usize * length));
        orders.insert(order);
    }
    assert_eq!(orders.len(), 2, "both epochs have one order");
}

#[test]
fn rows_are_slices_of_the_source_in_any_format() {
    let room = Room::new();
    let documents = documents(40);
    room.write("text/all.txt", text_file(&documents));
    for (i, document) in documents.iter().enumerate() {
        room.write(&format!("files/{i:02}.md"), document);
    }
    room.write("rows/a.jsonl", jsonl(&documents[..25]));
    room.write("rows/b.ndjson", jsonl(&documents[25..]));
    let zstd = Compression::ZSTD(ZstdLevel::default());
    room.write("tables/a.parquet", parquet(&documents[..25], SCHEMA, zstd));
    room.write("tables/b.parquet", parquet(&documents[25..], SCHEMA, Compression::SNAPPY));
    room.write("mixed/a.jsonl", jsonl(&documents[..7]));
    room.write("mixed/b.parquet", parquet(&documents[7..20], SCHEMA, Compression::UNCOMPRESSED));
    room.write("mixed/c.txt", text_file(&documents[20..]));
    let ring = room.ring(&documents);
    let mut prints = BTreeSet::new();
    for source in ["a=1:text/all.txt", "a=1:files/*", "a=1:rows/*", "a=1:tables/*", "a=2:mixed/*"] {
        for length in [1, 16, ring.len() - 1, ring.len(), ring.len() * 2 + 3] {
            let corpus = room.open(&[source], &room.settings(length));
            check_rows(&corpus, &ring, length);
            prints.insert(corpus.fingerprint().to_owned());
            let report = &corpus.report(0)[0];
            assert_eq!((report.documents, report.tokens), (40, ring.len() as u64));
            let bytes: usize = documents.iter().map(String::len).sum();
            assert_eq!(report.bytes, bytes as u64);
        }
    }
    assert_eq!(prints.len(), 1, "the same tokens are the same data");
}

/// Vocabularies above 65536 take four bytes per token.
#[test]
fn large_vocabularies_take_four_bytes_per_token() {
    let room = Room::new();
    let path = golden("model/llama-tiny/tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    let template = added[0].clone();
    added.extend((512..66_000).map(|id| {
        let mut token = template.clone();
        token["id"] = json!(id);
        token["content"] = json!(format!("<token-{id}>"));
        token["special"] = json!(id % 2 == 0);
        token
    }));
    room.write("large/tokenizer.json", json.to_string());
    let tokenizer = Tokenizer::from_folder(room.path("large")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 66_000);
    let room = Room { tokenizer, ..room };
    let documents = ["one <token-65999> two".to_string(), "<token-65998> three".to_string()];
    room.write("a.txt", text_file(&documents));
    let corpus = room.open(&["a=1:a.txt"], &room.settings(4));
    let ring = room.ring(&documents);
    assert!(ring.contains(&65_999) && !ring.contains(&65_998), "of special ones only the text");
    check_rows(&corpus, &ring, 4);
}

/// A document of many pieces has the tokens of the whole text.
#[test]
fn long_documents_are_not_cut_inside_words() {
    let room = Room::new();
    let long = ["Many of the words, 12 or 3.5 of them, aren't there.\n\n".repeat(12_000)];
    room.write("long.txt", &long[0]);
    room.write("long.jsonl", jsonl(&long));
    let ring = room.ring(&long);
    for name in ["long.txt", "long.jsonl"] {
        let corpus = room.open(&[&format!("a=1:{name}")], &room.settings(ring.len()));
        check_rows(&corpus, &ring, ring.len());
    }
}

#[test]
fn attention_and_positions_can_reset_at_documents() {
    let room = Room::new();
    let documents = documents(30);
    room.write("all.txt", text_file(&documents));
    let length = 64;
    let open = |reset_at_borders| {
        room.open(&["a=1:all.txt"], &CorpusSettings { reset_at_borders, ..room.settings(length) })
    };
    let (plain, reset) = (open(false), open(true));
    let rows = 0..2 * plain.rows_per_epoch(0);
    let (plain, reset) = (plain.batch(rows.clone()), reset.batch(rows.clone()));
    let whole = (0..rows.end as usize).map(|row| Segment::whole(row * length..(row + 1) * length));
    assert_eq!(plain.segments, whole.collect::<Vec<_>>());
    assert!(plain.positions.chunks(length).all(|row| row.iter().copied().eq(0..length as u32)));

    // Tokens, targets and keys are equal; only positions and attention differ.
    let but_segments =
        |batch: &Batch| (batch.tokens.clone(), batch.targets.clone(), batch.keys.clone());
    assert_eq!(but_segments(&plain), but_segments(&reset));
    assert!(reset.segments.len() > plain.segments.len());
    for (i, segment) in reset.segments.iter().enumerate() {
        let tokens = &reset.tokens[segment.tokens.clone()];
        assert!(tokens[1..].iter().all(|token| *token != 0), "a border inside {segment:?}");
        assert!(tokens[0] == 0 || segment.tokens.start % length == 0, "{segment:?} begins nowhere");
        let positions = &reset.positions[segment.tokens.clone()];
        assert!(positions.iter().copied().eq(0..tokens.len() as u32));
        assert_eq!(reset.ends[i] as usize, segment.tokens.end - 1);
        assert_eq!(reset.spans[i], segment.tokens, "a target each");
    }
}

/// If the tokenizer adds BOS, every document begins with it, and it is never predicted.
#[test]
fn documents_begin_with_bos_if_the_tokenizer_adds_it() {
    let room = Room::new();
    fs::create_dir(room.path("bos")).unwrap();
    let source = golden("model/llama-tiny/tokenizer.json");
    fs::copy(source, room.path("bos/tokenizer.json")).unwrap();
    let config = r#"{"tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>", "add_bos_token": true}"#;
    room.write("bos/tokenizer_config.json", config);
    let tokenizer = Tokenizer::from_folder(room.path("bos")).unwrap();
    let room = Room { tokenizer, ..room };
    let documents = documents(6);
    room.write("all.txt", text_file(&documents));
    let encode = |text: &String| room.tokenizer.encode(text, Special::AsText).unwrap();
    let ring: Vec<u32> =
        documents.iter().flat_map(|text| [vec![1], encode(text), vec![0]].concat()).collect();
    let settings = CorpusSettings { reset_at_borders: true, ..room.settings(ring.len()) };
    let batch = room.open(&["a=1:all.txt"], &settings).batch(0..1);
    assert_eq!(batch.targets.len(), ring.len() - documents.len());
    assert!(batch.targets.iter().all(|(_, token)| *token != 1));
    let firsts = batch.segments.iter().map(|segment| batch.tokens[segment.tokens.start]);
    assert!(firsts.skip(1).all(|token| token == 1));
}

/// The part of a document does not depend on its order and file; held-out targets are all tokens of the
/// held-out documents, and their bytes are those of the text.
#[test]
fn held_out_documents_are_evaluated_once_and_never_trained_on() {
    let room = Room::new();
    let mut documents = documents(300);
    let parts = |documents: &[String], name: &str| {
        room.write(&format!("{name}.jsonl"), jsonl(documents));
        let settings = CorpusSettings { validation_split: 0.1, ..room.settings(32) };
        let corpus = room.open(&[&format!("a=1:{name}.jsonl")], &settings);
        let report = corpus.report(0).remove(0);
        let held_out = corpus.validation(0, 0..u64::MAX);
        assert_eq!(corpus.validation_rows(0), report.validation_tokens.div_ceil(32));
        assert_eq!(held_out.batch.segments.len() as u64, corpus.validation_rows(0));
        assert_eq!(held_out.batch.targets.len() as u64, report.validation_tokens);
        assert_eq!(held_out.bytes, report.validation_bytes);
        let row = |row| corpus.validation(0, row..row + 1);
        let rows: Vec<_> = (0..corpus.validation_rows(0)).map(row).collect();
        assert_eq!(rows.iter().map(|row| row.bytes).sum::<u64>(), held_out.bytes);
        assert!(row(corpus.validation_rows(0)).batch.tokens.is_empty());

        let targets: Vec<u32> = held_out.batch.targets.iter().map(|(_, token)| *token).collect();
        let text = |tokens: &[u32]| room.tokenizer.decode(tokens, false).unwrap();
        let held_out: BTreeSet<String> = targets.split(|token| *token == 0).map(text).collect();
        let rows = corpus.batch(0..corpus.rows_per_epoch(0) + 1);
        let train = room.open(
            &[&format!("a=1:{name}.jsonl")],
            &CorpusSettings { sequence_length: report.tokens as usize, ..settings },
        );
        let epoch = train.batch(0..1).tokens;
        let trained: BTreeSet<String> = epoch.split(|token| *token == 0).map(text).collect();
        assert!(rows.count() > 0);
        (held_out, trained, report)
    };
    let (held_out, trained, report) = parts(&documents, "forwards");
    assert!((15..=45).contains(&report.validation_documents), "{report:?}");
    assert_eq!(report.documents + report.validation_documents, 300);
    let held_out_documents = documents.iter().filter(|text| held_out.contains(*text)).count();
    assert_eq!(held_out_documents as u64, report.validation_documents);
    // All documents are whole, except the one at the ends of the ring.
    let common: Vec<_> = held_out.intersection(&trained).filter(|text| !text.is_empty()).collect();
    assert!(common.is_empty(), "{common:?}");
    documents.reverse();
    documents.truncate(250);
    let (fewer, ..) = parts(&documents, "backwards");
    assert!(fewer.is_subset(&held_out) && fewer.len() > 8);
}

#[test]
fn sources_are_interleaved_by_weight() {
    let room = Room::new();
    room.write("a.txt", text_file(&documents(20)));
    room.write("b.jsonl", jsonl(&documents(9)));
    room.write("c.txt", "Hardly anything.");
    let sources = ["a=0.5:a.txt", "b=0.3:b.jsonl", "c=0.2:c.txt"];
    let corpus = room.open(&sources, &room.settings(16));
    assert_eq!(corpus.sources().map(|spec| &*spec.name).collect::<Vec<_>>(), ["a", "b", "c"]);
    let mut counts = BTreeMap::new();
    for row in 0..1000 {
        *counts.entry(corpus.place(row).source).or_insert(0) += 1;
    }
    for (source, needed) in [(0, 500), (1, 300), (2, 200)] {
        assert!((counts[&source] as i64 - needed).abs() <= 1, "{counts:?}");
    }
    let report = corpus.report(1000);
    for (i, line) in report.iter().enumerate() {
        assert_eq!(line.rows, counts[&i] as u64);
        assert_eq!(line.epochs, line.rows as f64 * 16.0 / line.tokens as f64);
    }
    let weights: f64 = report.iter().map(|line| line.weight).sum();
    assert!((weights - 1.0).abs() < 1e-12);

    // A batch depends only on its row indices and the seed.
    let whole = corpus.batch(500..508);
    let again = room.open(&sources, &room.settings(16));
    let parts: Vec<Batch> = [500..503, 503..508].map(|rows| again.batch(rows)).into();
    let tokens: Vec<u32> = parts.iter().flat_map(|batch| batch.tokens.clone()).collect();
    assert_eq!(whole.tokens, tokens);
    let other = room.open(&sources, &CorpusSettings { seed: 8, ..room.settings(16) });
    assert_ne!(other.batch(500..508).tokens, whole.tokens);
    assert_eq!(other.fingerprint(), corpus.fingerprint());
}

fn shards(room: &Room) -> Vec<PathBuf> {
    let entries = fs::read_dir(room.path("cache")).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

#[test]
fn sources_are_tokenized_once() {
    let mut room = Room::new();
    room.write("a.txt", text_file(&documents(20)));
    room.write("b.txt", text_file(&documents(10)));
    let settings = room.settings(16);
    let open = |room: &Room, settings: &CorpusSettings| {
        let (corpus, reports) = room.try_open(&["a=1:a.txt", "b=1:b.txt"], settings).unwrap();
        (corpus.fingerprint().to_owned(), reports, shards(room).len())
    };
    let (print, ..) = open(&room, &settings);
    assert_eq!(open(&room, &settings), (print.clone(), 0, 2));
    // The same shards are used.
    let other = CorpusSettings { sequence_length: 9, reset_at_borders: true, seed: 1, ..settings };
    assert_eq!(open(&room, &other), (print.clone(), 0, 2));
    // The same bytes with a later modification time are tokenized again, to the same data.
    std::thread::sleep(std::time::Duration::from_millis(20));
    room.write("b.txt", text_file(&documents(10)));
    assert_eq!(open(&room, &other), (print.clone(), 1, 3));
    // The partial folder of a killed run is removed, whether or not a shard has to be written.
    room.write("cache/.partial/train.tokens", "half");
    assert_eq!(open(&room, &other), (print.clone(), 0, 3));
    room.write("cache/.partial/train.tokens", "half");
    room.write("b.txt", text_file(&documents(11)));
    let (changed, reports, folders) = open(&room, &other);
    assert!(changed != print && (reports, folders) == (1, 4));
    // The partial folder of a running process is kept.
    room.write("cache/.partial/train.tokens", "half");
    let lock = fs::File::open(room.path("cache/.lock")).unwrap();
    lock.lock().unwrap();
    assert_eq!(open(&room, &other), (changed.clone(), 0, 5));
    drop(lock);
    assert_eq!(open(&room, &other), (changed.clone(), 0, 4));
    let (split, reports, _) =
        open(&room, &CorpusSettings { validation_split: 0.2, ..other.clone() });
    assert!(split != changed && reports == 2);
    room.tokenizer = Tokenizer::from_folder(golden("model/qwen2-tiny")).unwrap();
    let (retokenized, reports, _) = open(&room, &other);
    assert!(retokenized != changed && reports == 2);
}

/// Another chat template changes the tokens of conversations, and nothing else.
#[test]
fn conversations_are_tokenized_again_under_another_template() {
    let mut room = Room::new();
    room.write("a.txt", text_file(&documents(9)));
    let turn = |role: &str| json!({ "role": role, "content": "goes on" });
    let row = json!({ "messages": [turn("user"), turn("assistant")] });
    room.write("b.jsonl", format!("{row}\n"));
    let mut open = |end: &str, date: &str| {
        let text = "{% for m in messages %}{{ m.role + ' ' + m.content }}END{% endfor %}";
        room.tokenizer.set_chat_template(&text.replace("END", end)).unwrap();
        room.tokenizer.set_template_time(first_second(date).unwrap());
        let of = |source: &str| {
            let (corpus, reports) = room.try_open(&[source], &room.settings(16)).unwrap();
            (corpus.fingerprint().to_owned(), reports)
        };
        (of("a=1:a.txt"), of("b=1:b.jsonl"))
    };
    let day = "2024-02-29";
    let (text, chat) = open(".", day);
    assert_eq!((text.1, chat.1), (1, 1));
    // The date does not matter to a template that does not print it.
    assert_eq!(open(".", "2024-03-01"), ((text.0.clone(), 0), (chat.0.clone(), 0)));
    let (text_then, chat_then) = open("!", day);
    assert_eq!(text_then, (text.0.clone(), 0));
    assert!(chat_then.0 != chat.0 && chat_then.1 == 1);
    let dated = " {{ strftime_now('%d %B %Y') }}";
    let (text_dated, chat_dated) = open(dated, day);
    assert_eq!((&text_dated, chat_dated.1), (&text_then, 1));
    assert_eq!(open(dated, day).1, (chat_dated.0.clone(), 0));
    let (text_later, chat_later) = open(dated, "2024-03-01");
    assert_eq!(text_later, text_then);
    assert!(chat_later.0 != chat_dated.0 && chat_later.1 == 1);
}

#[test]
fn a_changed_shard_is_rejected() {
    let check = |change: &dyn Fn(&Path), words: &str| {
        let room = Room::new();
        room.write("a.txt", text_file(&documents(20)));
        room.open(&["a=1:a.txt"], &room.settings(16));
        change(&shards(&room)[0]);
        let found = room.try_open(&["a=1:a.txt"], &room.settings(16)).unwrap_err();
        assert!(found.contains(words), "{found:?} says nothing of {words:?}");
        assert!(found.ends_with("remove its folder to have the source tokenized again"));
        assert!(!found.contains('\n'));
    };
    let tokens = |shard: &Path| shard.join("train.tokens");
    let change_byte = |shard: &Path| {
        let mut bytes = fs::read(tokens(shard)).unwrap();
        bytes[99] ^= 1;
        fs::write(tokens(shard), bytes).unwrap();
    };
    check(&change_byte, "train.tokens: has changed since it was written");
    check(&|shard| fs::write(tokens(shard), "short").unwrap(), "has 5 bytes, needed");
    check(&|shard| fs::remove_file(tokens(shard)).unwrap(), "train.tokens: No such file");
    check(&|shard| fs::write(shard.join("shard.json"), "{}").unwrap(), "shard.json: missing field");
}

#[test]
fn invalid_sources_are_one_error_and_leave_no_files() {
    let room = Room::new();
    let check = |sources: &[&str], change: &dyn Fn(&mut CorpusSettings), words: &str| {
        let mut settings = room.settings(16);
        change(&mut settings);
        let found = room.try_open(sources, &settings).map(|_| ()).unwrap_err();
        assert!(found.contains(words), "{found:?} says nothing of {words:?}");
        assert_eq!(shards(&room), Vec::<PathBuf>::new(), "after {found}");
    };
    fs::create_dir(room.path("cache")).unwrap();
    let same = |_: &mut CorpusSettings| {};
    room.write("good.txt", text_file(&documents(9)));
    room.write("empty/a.txt", " \n<|endoftext|>\n\n");
    room.write("empty/b.jsonl", "{\"text\": \"\"}\n");
    room.write("latin.txt", [text_file(&documents(3)).as_bytes(), b"caf\xe9."].concat());
    room.write(
        "rows.jsonl",
        "{\"text\": \"good\"}\n\n[1]\n{\"txt\": 1}\n{\"text\": 5}\n{\"text\"\n",
    );
    room.write("none.jsonl", "{\"prompt\": \"a\"}\n");
    room.write("no.parquet", "PAR1 this is none PAR1");
    room.write(
        "title.parquet",
        parquet(&["a"], "message m { optional binary title; }", Compression::UNCOMPRESSED),
    );
    room.write("latin.parquet", parquet(&[&b"fine"[..], b"caf\xe9"], SCHEMA, Compression::SNAPPY));

    check(&[], &same, "no sources, needed at least one");
    check(&["a=1:good.txt", "a=2:good.txt"], &same, "source \"a\" is given twice");
    check(&["a=0:good.txt"], &same, "needed a number above 0");
    check(&["a=1:bad*.txt"], &same, "no file matches \"bad*.txt\"");
    check(&["a=1:empty"], &same, "no file matches");
    check(&["a=1:bad[.txt"], &same, "is not a valid glob pattern");
    check(&["a=1:empty/*"], &same, "source \"a\": no text in its 2 files");
    let latin = text_file(&documents(3)).len() + 3;
    check(&["a=1:latin.txt"], &same, &format!("latin.txt: byte {latin} is not UTF-8"));
    check(&["a=1:rows.jsonl"], &same, "rows.jsonl: 4 of 5 rows are invalid");
    check(&["a=1:rows.jsonl"], &same, "rows.jsonl:3: found a list of 1, needs a JSON object");
    check(&["a=1:rows.jsonl"], &same, "rows.jsonl:5: `text` is 5, needs a string");
    check(
        &["a=1:none.jsonl"],
        &same,
        "none.jsonl:1: unknown kind of row: found the keys `prompt`, needs `text` or `messages`",
    );
    check(&["a=1:no.parquet"], &same, "no.parquet: ");
    check(&["a=1:title.parquet"], &same, "title.parquet: no column \"text\", found title");
    let third = "latin.parquet: row 3, column \"text\": byte 3 is not UTF-8";
    check(&["a=1:latin.parquet"], &same, third);
    check(&["a=1:good.txt"], &|settings| settings.sequence_length = 0, "the sequence length is 0");
    check(
        &["a=1:good.txt"],
        &|settings| settings.validation_split = 1.0,
        "the validation split is 1",
    );
    let all = |settings: &mut CorpusSettings| settings.validation_split = 0.99999;
    check(&["a=1:good.txt"], &all, "source \"a\": all 9 documents fall into the validation split");
    let nowhere = |settings: &mut CorpusSettings| settings.cache = room.path("good.txt");
    check(&["a=1:good.txt"], &nowhere, "good.txt: cannot make the folder");

    let none = CorpusSettings { validation_split: 1e-5, ..room.settings(16) };
    let found = room.try_open(&["a=1:good.txt"], &none).unwrap_err();
    assert!(found.starts_with("none of 9 documents falls into the validation split"), "{found}");

    let spec = format!("a=1:{}", room.path("good.txt").display()).parse().unwrap();
    let stopped = AtomicBool::new(true);
    let settings = CorpusSettings { cache: room.path("other"), ..room.settings(16) };
    let found = Corpus::open(&[spec], &room.tokenizer, &settings, &stopped, |_| ()).unwrap_err();
    assert_eq!(found.to_string(), "stopped while the rows were read");
    assert_eq!(fs::read_dir(room.path("other")).unwrap().count(), 1, "but for the lock");
}

/// A damaged Parquet file gives an error or some rows, but no panic.
#[test]
fn damaged_parquet_files_do_not_panic() {
    let room = Room::new();
    let bytes = parquet(&documents(12), SCHEMA, Compression::SNAPPY);
    proptest!(ProptestConfig::with_cases(200), |(at in 0..bytes.len(), to: u8, cut in 0..bytes.len() * 4)| {
        let mut bytes = bytes.clone();
        bytes[at] = to;
        bytes.truncate(cut.max(1));
        room.write("a.parquet", bytes);
        if let Err(found) = room.try_open(&["a=1:a.parquet"], &room.settings(16)) {
            prop_assert!(!found.contains('\n'), "{found}");
        }
        let _ = fs::remove_dir_all(room.path("cache"));
    });
}
