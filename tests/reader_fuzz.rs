//! Dataset files of random and of damaged bytes: whatever they hold, readers end, hold no more
//! than their limits, and never panic.

use std::fs;

use lorafit::data::reader::{Limits, Reader};
use lorafit::recipe::plan::SampleBy;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::readers::{SMALL, file, gzip, packed, parquet, rows, zstd};

const NAMES: [&str; 8] = [
    "a.jsonl",
    "a.json",
    "a.csv",
    "a.tsv",
    "a.txt",
    "a.md",
    "a.parquet",
    "a",
];
const MAGICS: [&[u8]; 6] = [
    b"",
    b"PAR1",
    b"\x1f\x8b\x08",
    b"\x28\xb5\x2f\xfd",
    b"[",
    b"{",
];
const SAMPLES: [SampleBy; 3] = [SampleBy::Line, SampleBy::Paragraph, SampleBy::Document];

/// Reads a file in every way; skipping must count the rows that reading gives.
fn read(name: &str, content: &[u8]) {
    let file = file(name, content);
    for sample_by in SAMPLES {
        for limits in [SMALL, Limits::default()] {
            let Ok(read) = rows(&file.path, sample_by, limits) else {
                continue;
            };
            let mut reader = Reader::open(&file.path, sample_by).unwrap();
            let skipped = reader.skip(u64::MAX);
            // Damage inside of a row group that is gone past does not show.
            if let Ok(skipped) = skipped {
                assert_eq!(skipped, read.len() as u64, "{name} {sample_by:?}");
            }
        }
    }
    fs::remove_file(&file.path).unwrap();
}

/// Valid files of every kind, each with rows of several lengths.
fn valid() -> Vec<(&'static str, Vec<u8>)> {
    let jsonl = "{\"a\": \"x\\\"}\", \"b\": [1, {\"c\": null}]}\n\n{\"a\": \"é\"}\r\n{}\n";
    let array = "[\n{\"a\": \"],[\"},\n{\"b\": [[], {}]}\n , {}]\n";
    let values = "{\n\"a\": {\"b\": \"}\"}}\n{\"c\": 1}";
    let csv = "a,b\n1,\"x\n\"\"y\"\"\"\n\n,\r\n\"é\",2\n";
    let text = "a b\nc\n\n \nd\r\n\r\ne";
    let long = "long ".repeat(30);
    let (one, two) = ([("1", "x"), ("1", long.as_str())], [("é", "")]);
    let groups: [&[(&str, &str)]; 2] = [&one, &two];
    let second = |encoding| {
        WriterProperties::builder()
            .set_writer_version(WriterVersion::PARQUET_2_0)
            .set_dictionary_enabled(false)
            .set_encoding(encoding)
            .build()
    };
    let mut files = vec![
        ("a.jsonl", jsonl.into()),
        ("a.json", array.into()),
        ("a.json", values.into()),
        ("a.csv", csv.into()),
        ("a.tsv", csv.replace(',', "\t").into_bytes()),
        ("a.txt", text.into()),
        ("a.jsonl", gzip(jsonl.as_bytes())),
        (
            "a.csv",
            [gzip(csv.as_bytes()), gzip(csv.as_bytes())].concat(),
        ),
        ("a.json", zstd(array.as_bytes())),
        (
            "a.txt",
            [zstd(text.as_bytes()), zstd(text.as_bytes())].concat(),
        ),
    ];
    for properties in [
        packed(Compression::UNCOMPRESSED),
        packed(Compression::SNAPPY),
        packed(Compression::GZIP(Default::default())),
        packed(Compression::LZ4),
        packed(Compression::LZ4_RAW),
        packed(Compression::ZSTD(ZstdLevel::default())),
        second(Encoding::PLAIN),
        second(Encoding::DELTA_BYTE_ARRAY),
        second(Encoding::DELTA_LENGTH_BYTE_ARRAY),
    ] {
        files.push(("a.parquet", parquet(&groups, properties)));
    }
    files
}

#[test]
fn valid_files_are_read() {
    for (name, content) in valid() {
        let file = file(name, content);
        let rows = rows(&file.path, SampleBy::Line, SMALL).unwrap();
        assert!(
            rows.len() > 1 && rows.iter().all(|(_, row)| row.is_ok()),
            "{name}: {rows:?}"
        );
    }
}

/// Damage to a file.
#[derive(Debug, Clone)]
enum Damage {
    Set(Index, u8),
    Flip(Index, u8),
    Cut(Index),
    Remove(Index, usize),
    Repeat(Index, usize),
    Insert(Index, Vec<u8>),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let length = bytes.len();
        let end = |at: usize, count: usize| (at + count).min(length);
        match self {
            Self::Set(at, byte) => bytes[at.index(length)] = *byte,
            Self::Flip(at, bit) => bytes[at.index(length)] ^= 1 << bit,
            Self::Cut(at) => bytes.truncate(at.index(length)),
            Self::Remove(at, count) => {
                let at = at.index(length);
                bytes.drain(at..end(at, *count));
            }
            Self::Repeat(at, count) => {
                let at = at.index(length);
                let part = bytes[at..end(at, *count)].to_vec();
                bytes.splice(at..at, part);
            }
            Self::Insert(at, part) => {
                let at = at.index(length);
                bytes.splice(at..at, part.iter().copied());
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        4 => (at(), 0..8u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        1 => at().prop_map(Damage::Cut),
        1 => (at(), 1..20usize).prop_map(|(at, count)| Damage::Remove(at, count)),
        1 => (at(), 1..20usize).prop_map(|(at, count)| Damage::Repeat(at, count)),
        // Numbers of variable length that are as large as can be, among others.
        1 => (at(), prop_oneof![
            prop::collection::vec(any::<u8>(), 1..9),
            (1..10usize).prop_map(|count| [vec![0xff; count], vec![0x7f]].concat()),
        ]).prop_map(|(at, part)| Damage::Insert(at, part)),
    ]
}

/// How many cases run; `PROPTEST_CASES` asks for more.
fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_bytes_are_read_to_their_end(
        name in prop::sample::select(&NAMES[..]),
        magic in prop::sample::select(&MAGICS[..]),
        bytes in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        read(name, &[magic, &bytes].concat());
    }

    #[test]
    fn random_structure_is_read_to_its_end(
        name in prop::sample::select(&NAMES[..]),
        pieces in prop::collection::vec(
            prop::sample::select(&["\"", "\\", "{", "}", "[", "]", ",", ";", "\t", "\n", "\r\n", "a", " ", ":", "é", "{\"a\": 1}"][..]),
            0..60,
        ),
    ) {
        let text = pieces.concat();
        read(name, text.as_bytes());
        read(name, &gzip(text.as_bytes()));
    }

    #[test]
    fn damaged_files_are_read_to_their_end(
        which in any::<Index>(),
        damages in prop::collection::vec(damage(), 1..5),
    ) {
        let files = valid();
        let (name, mut content) = files[which.index(files.len())].clone();
        for damage in damages {
            damage.apply(&mut content);
        }
        read(name, &content);
    }

    #[test]
    fn tables_are_read_as_the_csv_crate_does(
        pieces in prop::collection::vec(
            prop::sample::select(&["\"", ",", "\n", "\r\n", "a", " ", "é", "\"\"", "\",\"", "x,y"][..]),
            0..60,
        ),
    ) {
        let text = format!("a,b\n{}", pieces.concat());
        let mut reference = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
        let want: Vec<Vec<String>> = reference
            .records()
            .map(|record| record.unwrap().iter().map(str::to_owned).collect())
            .collect();
        let found = rows(&file("a.csv", &text).path, SampleBy::Line, Limits::default()).unwrap();
        prop_assert_eq!(found.len(), want.len(), "{:?}", text);
        for ((place, row), want) in found.into_iter().zip(want) {
            match row {
                Ok(row) => {
                    let cells: Vec<String> = row.values().map(|c| c.as_str().unwrap().to_owned()).collect();
                    prop_assert_eq!(cells, want, "{:?}", text);
                }
                // The reference closes an open quote at the end of the file.
                Err(error) => prop_assert!(want.len() != 2 || error.contains("not closed"), "{}: {}", place, error),
            }
        }
    }
}
