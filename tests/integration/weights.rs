//! Weights files: golden files, comparison with gguf-rs, and malformed files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use quantune::quant::BlockType;
use quantune::weights::{
    Checkpoint, Gguf, GgufValue, HfFolder, NewTensor, OwnedValue, Safetensors, ValueType, inspect,
    write_gguf,
};
use tempfile::{TempDir, tempdir};

use crate::allocations::largest_allocation;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/weights/types.gguf")
}

fn file(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn values(block_type: BlockType, bytes: &[u8]) -> Vec<f32> {
    let count = bytes.len() / block_type.block_bytes() * block_type.block_len();
    let mut values = vec![f32::NAN; count];
    block_type.dequantize(bytes, &mut values);
    values
}

// Golden files and round trips.

#[test]
fn block_type_values_match_gguf_py() {
    let gguf = Gguf::open(golden()).unwrap();
    for &block_type in BlockType::ALL {
        let stored = gguf.tensor(&block_type.to_string()).unwrap();
        assert_eq!((stored.block_type, &stored.shape[..]), (block_type, &[2, 256][..]));
        let needed = gguf.tensor(&format!("{block_type}.values")).unwrap();
        let needed = values(BlockType::F32, &needed.bytes);

        let matrix = stored.matrix().unwrap();
        let mut found = vec![f32::NAN; 2 * 256];
        matrix.read_tile(0..2, 0..256, &mut found);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&needed), "{block_type}");
    }
}

#[test]
fn metadata_of_every_type_is_read() {
    let gguf = Gguf::open(golden()).unwrap();
    assert_eq!((gguf.version(), gguf.alignment()), (3, 64));
    let keys: Vec<&str> = gguf.metadata().map(|(key, _)| key).collect();
    assert_eq!(keys[..3], ["general.architecture", "general.alignment", "value.u8"]);

    assert_eq!(gguf.get("value.u8"), Some(GgufValue::U8(u8::MAX)));
    assert_eq!(gguf.get("value.i8"), Some(GgufValue::I8(i8::MIN)));
    assert_eq!(gguf.get("value.u16"), Some(GgufValue::U16(u16::MAX)));
    assert_eq!(gguf.get("value.i16"), Some(GgufValue::I16(i16::MIN)));
    assert_eq!(gguf.get("value.u32"), Some(GgufValue::U32(u32::MAX)));
    assert_eq!(gguf.get("value.i32"), Some(GgufValue::I32(i32::MIN)));
    assert_eq!(gguf.get("value.i64"), Some(GgufValue::I64(i64::MIN)));
    assert_eq!(gguf.u64("value.u64").unwrap(), Some(u64::MAX));
    assert_eq!(gguf.u64("value.u8").unwrap(), Some(255));
    assert_eq!(gguf.f64("value.f32").unwrap(), Some(f64::from(1e-5f32)));
    assert_eq!(gguf.f64("value.f64").unwrap(), Some(1e-5));
    assert_eq!(gguf.bool("value.bool").unwrap(), Some(true));
    assert_eq!(gguf.str("value.string").unwrap(), Some("naïve 🦙"));
    let strings: Vec<&[u8]> = gguf.strings("array.string").unwrap().unwrap().collect();
    assert_eq!(strings, [&b""[..], "Ġthe".as_bytes(), "🦙".as_bytes()]);
    assert_eq!(gguf.i32s("array.i32").unwrap(), Some(vec![-1, 0, i32::MAX]));
    assert_eq!(gguf.f32s("array.f32").unwrap(), Some(vec![0.5, -2.0]));
    assert_eq!(gguf.array("array.bool").unwrap().unwrap().of(), ValueType::Bool);
    assert_eq!(gguf.str("no.such.key").unwrap(), None);

    let message = |e: quantune::weights::WeightsError| e.to_string();
    let wrong = gguf.u64("value.i8").map_err(message).unwrap_err();
    assert!(wrong.contains("\"value.i8\" is i8 -128, needed an integer that is not"), "{wrong}");
    let wrong = gguf.str("array.i32").map_err(message).unwrap_err();
    assert!(wrong.contains("is 3 x i32 [-1, 0, 2147483647], needed text"), "{wrong}");
    let wrong = gguf.i32s("array.f32").map_err(message).unwrap_err();
    assert!(wrong.contains("needed an array of integers"), "{wrong}");
    let wrong = gguf.tensor("no.such").map_err(message).unwrap_err();
    assert!(wrong.contains("types.gguf: no tensor \"no.such\""), "{wrong}");
    let wrong = gguf.tensor("F32").unwrap().vector().map_err(message).unwrap_err();
    assert!(wrong.contains("\"F32\" has shape [2, 256], needed 1 dimensions"), "{wrong}");
}

/// Writes the contents of `gguf` with our writer.
fn rewrite(gguf: &Gguf, path: &Path) {
    let metadata: Vec<_> =
        gguf.metadata().map(|(key, value)| (key.to_string(), value.to_owned())).collect();
    let stored: Vec<_> =
        gguf.tensors().iter().map(|info| gguf.tensor(&info.name).unwrap()).collect();
    let tensors: Vec<_> = stored
        .iter()
        .map(|tensor| NewTensor {
            name: &tensor.name,
            shape: &tensor.shape,
            block_type: tensor.block_type,
            bytes: &tensor.bytes,
        })
        .collect();
    write_gguf(path, &metadata, &tensors).unwrap();
}

#[test]
fn writer_bytes_match_gguf_py() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("again.gguf");
    rewrite(&Gguf::open(golden()).unwrap(), &path);
    assert!(fs::read(&path).unwrap() == fs::read(golden()).unwrap(), "the files differ");
}

/// A small file with cases that `types.gguf` lacks: nested and empty arrays, bytes that are not UTF-8,
/// one to four dimensions, default alignment.
fn small_gguf(path: &Path) {
    write_small(path, &small_metadata());
}

fn small_metadata() -> Vec<(String, OwnedValue)> {
    let nested = |items| OwnedValue::Array(ValueType::Array, items);
    vec![
        ("general.architecture".to_string(), OwnedValue::from("llama")),
        ("general.file_type".to_string(), OwnedValue::U32(3)),
        ("empty".to_string(), OwnedValue::Array(ValueType::F64, Vec::new())),
        (
            "nested".to_string(),
            nested(vec![
                OwnedValue::strings(["a", "b"]),
                OwnedValue::Array(ValueType::U8, vec![OwnedValue::U8(7)]),
            ]),
        ),
        ("bytes".to_string(), OwnedValue::strings([&b"\xff\xfe"[..], b"ok"])),
    ]
}

fn write_small(path: &Path, metadata: &[(String, OwnedValue)]) {
    let ones: Vec<u8> = [1f32; 24].iter().flat_map(|v| v.to_le_bytes()).collect();
    let blocks: Vec<u8> = (0..2 * 34).collect();
    let f32 = BlockType::F32;
    write_gguf(
        path,
        metadata,
        &[
            NewTensor { name: "one", shape: &[3], block_type: f32, bytes: &ones[..12] },
            NewTensor { name: "four", shape: &[2, 1, 4, 3], block_type: f32, bytes: &ones },
            NewTensor { name: "two", shape: &[2, 32], block_type: BlockType::Q8_0, bytes: &blocks },
        ],
    )
    .unwrap();
}

#[test]
fn written_files_read_back() {
    let folder = tempdir().unwrap();
    let (path, again) = (folder.path().join("small.gguf"), folder.path().join("again.gguf"));
    small_gguf(&path);
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.alignment(), 32);
    assert_eq!(
        gguf.get("nested").unwrap().to_string(),
        "2 x array [2 x string [\"a\", \"b\"], 1 x u8 [7]]"
    );
    assert!(gguf.f32s("empty").unwrap().unwrap().is_empty());
    assert_eq!(gguf.strings("bytes").unwrap().unwrap().next(), Some(&b"\xff\xfe"[..]));
    assert_eq!(gguf.tensor("one").unwrap().vector().unwrap(), [1.0; 3]);
    assert_eq!(gguf.tensor("four").unwrap().shape, [2, 1, 4, 3]);
    assert_eq!(gguf.tensor("two").unwrap().bytes[..], (0..2 * 34).collect::<Vec<u8>>());
    rewrite(&gguf, &again);
    assert_eq!(fs::read(&path).unwrap(), fs::read(&again).unwrap());

    // Version 2 differs from 3 only in the version number.
    let mut bytes = fs::read(&path).unwrap();
    bytes[4] = 2;
    let second = Gguf::open(file(&folder, "v2.gguf", &bytes)).unwrap();
    assert_eq!((second.version(), second.tensors()), (2, gguf.tensors()));
}

#[test]
fn writer_rejects_invalid_content() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("out.gguf");
    let long = "n".repeat(64);
    let tensor = |name, shape, bytes| NewTensor { name, shape, block_type: BlockType::Q8_0, bytes };
    let metadata = [
        ("general.alignment".to_string(), OwnedValue::U32(7)),
        ("twice".to_string(), OwnedValue::U8(0)),
        ("twice".to_string(), OwnedValue::U8(0)),
        (
            "mixed".to_string(),
            OwnedValue::Array(ValueType::U8, vec![OwnedValue::U8(0), OwnedValue::I8(0)]),
        ),
    ];
    let tensors = [
        tensor(&long, &[32], &[0; 34]),
        tensor("cut", &[33], &[]),
        tensor("short", &[32], &[0; 33]),
    ];
    let message = write_gguf(&path, &metadata, &tensors).unwrap_err().to_string();
    for words in [
        "\"general.alignment\" must be a u32, a power of two",
        "\"twice\" appears twice",
        "\"mixed\" is an array of mixed types",
        "64 bytes, needed 1 to 63",
        "rows of 33 values are not whole Q8_0 blocks of 32",
        "takes 34 bytes, found 33",
    ] {
        assert!(message.contains(words), "{message}\nlacks: {words}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

// Comparison with gguf-rs: its sizes are wrong for some types (BF16 among them), all else must agree.

fn check_against_gguf_rs(path: &Path) {
    let ours = Gguf::open(path).unwrap();
    let container = gguf_rs::get_gguf_container_array_size(path.to_str().unwrap(), u64::MAX);
    let theirs = container.unwrap().decode().unwrap();
    assert_eq!(ours.alignment() as u64, theirs.alignment());
    assert_eq!(ours.data_offset() as u64, theirs.data_offset());
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    for (ours, theirs) in ours.tensors().iter().zip(theirs.tensors()) {
        let shape: Vec<u64> = ours.shape.iter().rev().map(|dim| *dim as u64).collect();
        assert_eq!(
            (&ours.name, ours.type_id, ours.offset, &shape),
            (&theirs.name, theirs.kind, theirs.offset, &theirs.shape)
        );
    }
    let metadata = theirs.metadata();
    assert_eq!(ours.metadata().len(), metadata.len());
    for (key, value) in ours.metadata() {
        let theirs = &metadata[key];
        match value {
            GgufValue::String(_) => assert_eq!(value.as_str(), theirs.as_str(), "{key}"),
            GgufValue::Array(items) => {
                assert_eq!(items.len(), theirs.as_array().unwrap().len(), "{key}");
            }
            GgufValue::Bool(v) => assert_eq!(Some(v), theirs.as_bool(), "{key}"),
            GgufValue::U64(v) => assert_eq!(Some(v), theirs.as_u64(), "{key}"),
            _ if value.as_i64().is_some() => assert_eq!(value.as_i64(), theirs.as_i64(), "{key}"),
            // It keeps the shortest digits of an f32, which as f64 are another number.
            GgufValue::F32(v) => assert_eq!(Some(v), theirs.as_f64().map(|v| v as f32), "{key}"),
            _ => assert_eq!(value.as_f64(), theirs.as_f64(), "{key}"),
        }
    }
}

#[test]
fn gguf_rs_lists_the_same_tensors() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    let mut metadata = small_metadata();
    metadata.retain(|(key, _)| key != "nested"); // It reads no arrays of arrays.
    write_small(&path, &metadata);
    check_against_gguf_rs(&path);
    check_against_gguf_rs(&golden());
}

// Malformed GGUF files.

/// The bytes of a GGUF header, written by hand so that it can be malformed in any way.
struct Raw(Vec<u8>);

impl Raw {
    fn new(tensors: u64, keys: u64) -> Self {
        let mut raw = Self(b"GGUF".to_vec());
        raw.0.extend(3u32.to_le_bytes());
        raw.0.extend(tensors.to_le_bytes());
        raw.0.extend(keys.to_le_bytes());
        raw
    }

    fn text(mut self, text: &[u8]) -> Self {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text);
        self
    }

    fn key(self, key: &str, of: u32, value: &[u8]) -> Self {
        let mut raw = self.text(key.as_bytes());
        raw.0.extend(of.to_le_bytes());
        raw.0.extend(value);
        raw
    }

    /// Dimensions innermost first, as in the file.
    fn tensor(self, name: &str, dims: &[u64], of: u32, offset: u64) -> Self {
        let mut raw = self.text(name.as_bytes());
        raw.0.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| raw.0.extend(dim.to_le_bytes()));
        raw.0.extend(of.to_le_bytes());
        raw.0.extend(offset.to_le_bytes());
        raw
    }

    fn data(mut self, bytes: usize) -> Vec<u8> {
        self.0.resize(self.0.len().next_multiple_of(32) + bytes, 0);
        self.0
    }
}

fn array(of: u32, len: u64) -> Vec<u8> {
    [&of.to_le_bytes()[..], &len.to_le_bytes()].concat()
}

#[test]
fn malformed_ggufs_are_errors() {
    let (f32, q8_0) = (0, 8);
    let big_endian = |version: u32| [b"GGUF".to_vec(), version.to_be_bytes().to_vec(), vec![0; 16]];
    let little = |version: u32| [b"GGUF".to_vec(), version.to_le_bytes().to_vec(), vec![0; 16]];
    let deep: Vec<u8> = (0..5).flat_map(|_| array(9, 1)).chain(array(0, 0)).collect();
    let one =
        |dims: &[u64], of, offset, data| Raw::new(1, 0).tensor("t", dims, of, offset).data(data);
    let pad = |raw: Raw| raw.data(64);
    let table: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "the file is empty"),
        ("two bytes", b"GG".to_vec(), "the GGUF header is cut: 4 bytes needed at byte 0"),
        (
            "other magic",
            b"PK\x03\x04....".to_vec(),
            "starts with \"PK\\\\x03\\\\x04\", needed \"GGUF\"",
        ),
        ("older format", b"tjgg........".to_vec(), "from before GGUF"),
        ("big-endian magic", b"FUGG\0\0\0\x03".to_vec(), "a big-endian GGUF file"),
        ("big-endian", big_endian(3).concat(), "a big-endian GGUF file (version 3)"),
        ("version 1", little(1).concat(), "GGUF version 1, needed version 2 or 3"),
        ("version 4", little(4).concat(), "GGUF version 4, needed version 2 or 3"),
        ("version 0", little(0).concat(), "needed version 2 or 3"),
        ("no counts", b"GGUF\x03\0\0\0\0".to_vec(), "8 bytes needed at byte 8"),
        ("tensor count", pad(Raw::new(u64::MAX, 0)), "a count of 18446744073709551615 tensors"),
        ("key count", pad(Raw::new(0, 1 << 40)), "a count of 1099511627776 metadata keys"),
        (
            "key length",
            pad(Raw::new(0, 1).key("", 0, &[0xff; 30])),
            "key 0 (after \"the header\"): the name at byte 24 is empty",
        ),
        ("key text", pad(Raw::new(0, 1).text(b"\xff\xff")), "the name at byte 24 is not UTF-8"),
        (
            "key twice",
            pad(Raw::new(0, 2).key("k", 0, &[1]).key("k", 0, &[1])),
            "metadata key \"k\" appears twice",
        ),
        (
            "value type",
            pad(Raw::new(0, 1).key("k", 13, &[])),
            "\"k\": unknown value type 13, needed 0 to 12",
        ),
        (
            "string length",
            pad(Raw::new(0, 1).key("k", 8, &[0xff; 8])),
            "\"k\": a count of 18446744073709551615 bytes of text",
        ),
        (
            "array count",
            pad(Raw::new(0, 1).key("k", 9, &array(12, u64::MAX / 8))),
            "array items at byte",
        ),
        ("array type", pad(Raw::new(0, 1).key("k", 9, &array(99, 0))), "unknown value type 99"),
        (
            "strings count",
            pad(Raw::new(0, 1).key("k", 9, &array(8, 1 << 32))),
            "a count of 4294967296 array items",
        ),
        ("nesting", pad(Raw::new(0, 1).key("k", 9, &deep)), "arrays nested deeper than 4"),
        ("value cut", Raw::new(0, 1).key("k", 12, &[0; 4]).0, "\"k\": 8 bytes needed at byte"),
        (
            "second key",
            pad(Raw::new(0, 2).key("k", 0, &[1]).key("l", 77, &[])),
            "key 1 (after \"k\"): \"l\": unknown",
        ),
        (
            "alignment 0",
            pad(Raw::new(0, 1).key("general.alignment", 4, &[0; 4])),
            "is u32 0, needed a u32, a power of two",
        ),
        (
            "alignment 7",
            pad(Raw::new(0, 1).key("general.alignment", 4, &[7, 0, 0, 0])),
            "is u32 7, needed",
        ),
        (
            "alignment u8",
            pad(Raw::new(0, 1).key("general.alignment", 0, &[32])),
            "is u8 32, needed",
        ),
        ("no dims", one(&[], f32, 0, 64), "\"t\": 0 dimensions, needed 1 to 4"),
        ("5 dims", one(&[1; 5], f32, 0, 64), "\"t\": 5 dimensions, needed 1 to 4"),
        ("zero dim", one(&[4, 0], f32, 0, 64), "shape [0, 4] holds no values"),
        ("product", one(&[1 << 32, 1 << 32], f32, 0, 64), "has more values than fit in memory"),
        ("product to 0", one(&[1 << 32, 1 << 32], 57, 0, 64), "has more values than fit in memory"),
        ("bytes", one(&[1 << 62], f32, 0, 64), "rows of 4611686018427387904 values"),
        ("rows", one(&[33, 2], q8_0, 0, 128), "rows of 33 values are not whole Q8_0 blocks of 32"),
        (
            "rows though product fits",
            one(&[16, 2], q8_0, 0, 128),
            "rows of 16 values are not whole Q8_0",
        ),
        ("unaligned", one(&[2], f32, 4, 64), "offset 4 is not a multiple of the alignment 32"),
        ("beyond", one(&[2], f32, 64, 64), "8 bytes at offset 64, the file has 64 bytes of data"),
        ("far beyond", one(&[2], f32, u64::MAX - 31, 64), "at offset 18446744073709551584"),
        ("cut data", one(&[16], f32, 0, 63), "64 bytes at offset 0, the file has 63 bytes"),
        ("unknown beyond", one(&[16], 57, 64, 64), "\"t\": 1 bytes at offset 64"),
        (
            "tensor list cut",
            Raw::new(1, 0).tensor("t", &[1; 4], f32, 0).0[..60].to_vec(),
            "\"t\": 8 bytes needed at byte",
        ),
        (
            "tensor twice",
            pad(Raw::new(2, 0).tensor("t", &[2], f32, 0).tensor("t", &[2], f32, 32)),
            "tensor \"t\" appears twice",
        ),
        (
            "shared bytes",
            pad(Raw::new(2, 0).tensor("b", &[2], f32, 32).tensor("a", &[9], f32, 0)),
            "tensors \"a\" and \"b\" share bytes",
        ),
        (
            "all faults at once",
            pad(Raw::new(2, 0).tensor("a", &[2], f32, 1).tensor("b", &[99], f32, 0)),
            "tensor \"a\": offset 1 is not a multiple of the alignment 32; tensor \"b\": 396 bytes",
        ),
    ];
    let folder = tempdir().unwrap();
    for (case, bytes, words) in table {
        let path = file(&folder, "bad.gguf", &bytes);
        let (found, largest) = largest_allocation(|| Gguf::open(&path));
        let message = found.map(|_| ()).expect_err(case).to_string();
        assert!(
            message.contains("bad.gguf: ") || message.contains("bad.gguf\": "),
            "{case}: {message}"
        );
        assert!(message.contains(words), "{case}: {message}\nlacks: {words}");
        assert!(!message.contains('\n'), "{case}: {message}");
        assert!(largest < 64 << 10, "{case}: an allocation of {largest} bytes");
    }
}

#[test]
fn a_tensor_of_an_unknown_type_fails_when_used() {
    let raw = Raw::new(3, 0).tensor("known", &[2], 0, 0).tensor("iq2", &[256], 22, 32).tensor(
        "new",
        &[256],
        4_000_000_000,
        64,
    );
    let folder = tempdir().unwrap();
    let path = file(&folder, "types.gguf", &raw.data(128));
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.tensor("known").unwrap().vector().unwrap(), [0.0, 0.0]);
    let message = gguf.tensor("iq2").unwrap_err().to_string();
    assert!(
        message.contains("tensor \"iq2\" is stored as IQ2_S, needed one of F32, F16"),
        "{message}"
    );
    let message = gguf.tensor("new").unwrap_err().to_string();
    assert!(message.contains("stored as type 4000000000"), "{message}");

    let listed = inspect(&path).unwrap();
    assert!(listed.summary.is_none());
    assert_eq!(listed.tensors[1].bytes, None);
    let types: Vec<_> = listed.types.iter().map(|total| (&*total.r#type, total.tensors)).collect();
    assert_eq!(types, [("F32", 1), ("IQ2_S", 1), ("type 4000000000", 1)]);
    assert!(listed.to_string().contains("iq2    IQ2_S"), "{listed}");
}

/// One mutation of a file.
#[derive(Debug, Clone)]
enum Change {
    Byte(prop::sample::Index, u8),
    Word(prop::sample::Index, u64),
    Cut(prop::sample::Index),
    Double(prop::sample::Index),
}

fn change() -> impl Strategy<Value = Change> {
    let word = prop_oneof![
        any::<u64>(),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 32),
        (0u64..40),
        (0u32..64).prop_map(|bit| 1 << bit),
    ];
    prop_oneof![
        4 => (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, v)| Change::Byte(at, v)),
        4 => (any::<prop::sample::Index>(), word).prop_map(|(at, v)| Change::Word(at, v)),
        1 => any::<prop::sample::Index>().prop_map(Change::Cut),
        1 => any::<prop::sample::Index>().prop_map(Change::Double),
    ]
}

fn mutate(bytes: &mut Vec<u8>, changes: &[Change]) {
    for change in changes {
        match change {
            _ if bytes.len() <= 8 => return,
            Change::Byte(at, v) => *at.get_mut(bytes) = *v,
            Change::Word(at, v) => {
                let at = at.index(bytes.len() - 7);
                bytes[at..at + 8].copy_from_slice(&v.to_le_bytes());
            }
            Change::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Change::Double(at) => {
                let at = at.index(bytes.len());
                let tail = bytes[at..].to_vec();
                bytes.extend(tail);
            }
        }
    }
    bytes.truncate(16 << 10);
}

/// Reads everything; failures must be `Err`.
fn read_all(path: &Path) {
    if let Ok(checkpoint) = Checkpoint::open(path) {
        for name in checkpoint.tensor_names() {
            if let Ok(tensor) = checkpoint.tensor(name) {
                let _ = (tensor.vector(), tensor.matrix());
                values(tensor.block_type, &tensor.bytes);
            }
        }
        if let Checkpoint::Gguf(gguf) = &checkpoint {
            gguf.metadata().for_each(|(_, value)| drop(value.to_owned()));
        }
    }
    if let Ok(listed) = inspect(path) {
        let _ = (listed.to_string(), serde_json::to_string(&listed).unwrap());
    }
}

/// The largest single allocation for a file of 16 KB. A block of 84 bytes becomes 1 KB, a byte of metadata
/// an `OwnedValue` of 32; counts that a file may claim are far larger.
const MOST: usize = 2 << 20;

static GOOD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = tempdir().unwrap();
    let path = folder.path().join("good.gguf");
    small_gguf(&path);
    fs::read(path).unwrap()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn mutated_ggufs_never_panic(changes in prop::collection::vec(change(), 1..6)) {
        let folder = tempdir().unwrap();
        let mut bytes = GOOD.clone();
        mutate(&mut bytes, &changes);
        let path = file(&folder, "bad.gguf", &bytes);
        let ((), largest) = largest_allocation(|| read_all(&path));
        prop_assert!(largest < MOST, "an allocation of {largest} bytes");
    }

    #[test]
    fn mutated_safetensors_never_panic(changes in prop::collection::vec(change(), 1..6)) {
        let folder = tempdir().unwrap();
        file(&folder, "config.json", b"{}");
        let mut bytes = small_safetensors();
        mutate(&mut bytes, &changes);
        let path = file(&folder, "model.safetensors", &bytes);
        let ((), largest) = largest_allocation(|| read_all(folder.path()));
        prop_assert!(largest < MOST, "an allocation of {largest} bytes");
        let _ = inspect(&path);
    }
}

// Safetensors and Hugging Face folders.

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

/// Two matrices, a vector and a tensor of integers, none of them aligned to its type.
fn small_safetensors() -> Vec<u8> {
    safetensors(
        r#"{"__metadata__":{"format":"pt"},
            "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
            "b":{"dtype":"BF16","shape":[2,2],"data_offsets":[24,32]},
            "c":{"dtype":"F16","shape":[2],"data_offsets":[32,36]},
            "ids":{"dtype":"I64","shape":[1],"data_offsets":[36,44]}}"#,
        44,
    )
}

#[test]
fn folder_is_read_with_any_alignment() {
    let folder = tempdir().unwrap();
    file(&folder, "config.json", br#"{"model_type":"llama","rope_theta":10000.0,"a":[1.5]}"#);
    // A leading space moves the data by a byte: all alignments of `f32` come up.
    for spaces in 0..4 {
        let text = small_safetensors();
        let header_len = text.len() - 8 - 44;
        let header = " ".repeat(spaces) + str::from_utf8(&text[8..8 + header_len]).unwrap();
        let mut bytes = safetensors(&header, 0);
        let numbers = [1.0f32, -2.0, 3.0, 4.0, 5.0, 6.5];
        bytes.extend(numbers.iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([0x80, 0x3f, 0, 0x40, 0x40, 0x40, 0x80, 0xbf]);
        bytes.extend([0, 0x3c, 0, 0xc0]);
        bytes.extend(7u64.to_le_bytes());
        // JSON must begin with `{`: leading spaces are JSON's, and serde_json takes them.
        file(&folder, "model.safetensors", &bytes);

        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.tensor_names(), ["a", "b", "c", "ids"]);
        let a = checkpoint.tensor("a").unwrap().matrix().unwrap();
        let mut row = [0.0; 3];
        a.read_row(1, &mut row);
        assert_eq!((a.rows(), row), (2, [4.0, 5.0, 6.5]));
        let b = checkpoint.tensor("b").unwrap();
        assert_eq!(values(b.block_type, &b.bytes), [1.0, 2.0, 3.0, -1.0]);
        assert_eq!(checkpoint.tensor("c").unwrap().vector().unwrap(), [1.0, -2.0]);
        let message = checkpoint.tensor("ids").unwrap_err().to_string();
        assert!(
            message.contains("\"ids\" is stored as I64, needed one of F32, F16, BF16"),
            "{message}"
        );
        let message = checkpoint.tensor("no").unwrap_err().to_string();
        assert!(message.contains("no tensor \"no\""), "{message}");
    }
    let listed = inspect(folder.path()).unwrap();
    let line = |key| listed.metadata.iter().find(|line| line.key == key).unwrap().value.clone();
    assert_eq!((listed.format, listed.values, listed.bytes), ("huggingface", 13, 44));
    assert_eq!((&*line("model_type"), &*line("format")), ("\"llama\"", "\"pt\""));
    assert_eq!((&*line("rope_theta"), &*line("a")), ("10000.0", "[1.5]"));
}

#[test]
fn malformed_safetensors_are_errors() {
    let tensor = |name: &str, dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let one = |dtype, shape, offsets| format!("{{{}}}", tensor("t", dtype, shape, offsets));
    // Ends near 2^64, where adding the header would overflow.
    let huge: Vec<String> = (0..15u64)
        .map(|i| {
            let (start, end) = (i << 60, (i + 1) << 60);
            tensor(
                &format!("t{i}"),
                "U8",
                &format!("[{}]", 1u64 << 60),
                &format!("[{start},{end}]"),
            )
        })
        .chain([tensor(
            "last",
            "U8",
            &format!("[{}]", (1u64 << 60) - 1),
            &format!("[{},{}]", 15u64 << 60, u64::MAX),
        )])
        .collect();
    let table: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "the file is empty"),
        ("cut", vec![1, 2, 3], "the safetensors header is cut: 8 bytes needed"),
        ("length", vec![0xff; 16], "a count of 18446744073709551615 bytes of safetensors header"),
        ("no JSON", safetensors("[1", 0), "the safetensors header cannot be read"),
        ("no object", safetensors("[]", 0), "the safetensors header cannot be read"),
        ("nested", safetensors(&"[".repeat(9999), 0), "the safetensors header cannot be read"),
        ("not UTF-8", [2u64.to_le_bytes().to_vec(), vec![0xff, 0xfe]].concat(), "cannot be read"),
        ("dtype", safetensors(&one("F31", "[1]", "[0,4]"), 4), "cannot be read"),
        (
            "short data",
            safetensors(&one("F32", "[2]", "[0,8]"), 7),
            "tensors take 8 bytes, the file has 7",
        ),
        (
            "long data",
            safetensors(&one("F32", "[2]", "[0,8]"), 9),
            "tensors take 8 bytes, the file has 9",
        ),
        ("size", safetensors(&one("F32", "[2]", "[0,4]"), 4), "cannot be read"),
        ("backwards", safetensors(&one("F32", "[1]", "[4,0]"), 4), "cannot be read"),
        ("hole", safetensors(&one("F32", "[1]", "[4,8]"), 8), "cannot be read"),
        (
            "product",
            safetensors(&one("F32", "[4294967296,4294967296]", "[0,0]"), 0),
            "cannot be read",
        ),
        ("negative", safetensors(&one("F32", "[-1]", "[0,4]"), 4), "cannot be read"),
        ("huge", safetensors(&format!("{{{}}}", huge.join(",")), 0), "bytes, the file has 0"),
        (
            "overlap",
            safetensors(
                &format!(
                    "{{{},{}}}",
                    tensor("a", "F32", "[1]", "[0,4]"),
                    tensor("b", "F32", "[1]", "[0,4]")
                ),
                4,
            ),
            "cannot be read",
        ),
    ];
    let folder = tempdir().unwrap();
    for (case, bytes, words) in table {
        let path = file(&folder, "bad.safetensors", &bytes);
        let (found, largest) = largest_allocation(|| Safetensors::open(&path));
        let message = found.map(|_| ()).expect_err(case).to_string();
        assert!(message.contains("bad.safetensors: "), "{case}: {message}");
        assert!(message.contains(words), "{case}: {message}\nlacks: {words}");
        assert!(largest < 64 << 10, "{case}: an allocation of {largest} bytes");
    }
}

#[test]
fn folders_without_model_are_errors() {
    let folder = tempdir().unwrap();
    let check = |words: &str| {
        let message = HfFolder::open(folder.path()).map(|_| ()).expect_err(words).to_string();
        assert!(message.contains(words), "{message}\nlacks: {words}");
    };
    check("the folder has no config.json");
    file(&folder, "config.json", b"{}");
    check("neither model.safetensors nor model.safetensors.index.json");
    file(&folder, "pytorch_model.bin", b"");
    check("a PyTorch pickle (pytorch_model.bin), needed safetensors");

    let index = "model.safetensors.index.json";
    file(&folder, index, b"{\"weight_map\": [");
    check("the index cannot be read");
    file(&folder, index, b"{\"weight_map\": {}}");
    check("the index names no tensors");
    file(&folder, index, br#"{"weight_map": {"a": "../config.json", "b": "2.st", "c": "3.st"}}"#);
    check(
        "shard \"../config.json\" is not a file of this folder; shard \"2.st\" is missing; shard \"3.st\"",
    );
    file(&folder, index, br#"{"weight_map": {"a": "1.st", "x": "1.st", "y": "2.st"}}"#);
    file(&folder, "1.st", &small_safetensors());
    file(&folder, "2.st", &small_safetensors());
    check("tensor \"x\" is not in shard \"1.st\"; tensor \"y\" is not in shard \"2.st\"");

    // Shards in order, each tensor from where the index says.
    file(
        &folder,
        index,
        br#"{"metadata": {"total_size": 1.5}, "weight_map": {"a": "2.st", "c": "1.st"}}"#,
    );
    let open = HfFolder::open(folder.path()).unwrap();
    assert_eq!(open.tensor_names().collect::<Vec<_>>(), ["c", "a"]);
    assert_eq!(open.tensor("a").unwrap().shape, [2, 3]);
    assert!(!open.contains("b"));
    fs::write(folder.path().join("2.st"), &small_safetensors()[..99]).unwrap();
    check("2.st: the safetensors header is cut");
}

#[test]
fn an_adapter_folder_is_inspected_with_its_config() {
    let folder = tempdir().unwrap();
    file(&folder, "adapter_model.safetensors", &small_safetensors());
    file(&folder, "adapter_config.json", br#"{"peft_type":"LORA","r":16,"target_modules":["q"]}"#);
    let listed = inspect(folder.path()).unwrap();
    let lines: Vec<_> =
        listed.metadata.iter().map(|line| (&*line.key, &*line.r#type, &*line.value)).collect();
    assert_eq!(
        lines,
        [
            ("peft_type", "string", "\"LORA\""),
            ("r", "number", "16"),
            ("target_modules", "array", "[\"q\"]"),
            ("format", "string", "\"pt\""),
        ]
    );
    assert_eq!((listed.format, listed.tensors.len()), ("safetensors", 4));
    file(&folder, "adapter_config.json", b"[]");
    let message = inspect(folder.path()).unwrap_err().to_string();
    assert!(message.contains("adapter_config.json: not a JSON object"), "{message}");
}

#[test]
fn unsupported_inputs_are_errors() {
    let folder = tempdir().unwrap();
    let check = |path: &Path, words: &str| {
        let message = Checkpoint::open(path).map(|_| ()).expect_err(words).to_string();
        assert!(message.contains(words), "{message}\nlacks: {words}");
    };
    check(&folder.path().join("none.gguf"), "none.gguf: No such file");
    check(
        &file(&folder, "text.gguf", b"hello there"),
        "neither a GGUF file (it does not start with",
    );
    check(&file(&folder, "m.safetensors", b""), "a single safetensors file, needed the folder");
    check(&file(&folder, "empty", b""), "neither a GGUF file");
    let magic = file(&folder, "no-extension", b"GGUF\x01\0\0\0");
    check(&magic, "GGUF version 1, needed version 2 or 3");
    check(folder.path(), "the folder has no config.json");
    assert!(matches!(Checkpoint::open(golden()), Ok(Checkpoint::Gguf(_))));
}
