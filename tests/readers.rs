//! Dataset files of every kind: the rows they give, where these are, and what is refused.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lorafit::data::faults::DataError;
use lorafit::data::reader::{Limits, Place, Reader};
use lorafit::recipe::plan::SampleBy;
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Map, Value, json};

/// A row and its place, or what is wrong with it.
pub type Row = (Place, Result<Map<String, Value>, String>);

/// Limits so small that every bound is met.
pub const SMALL: Limits = Limits {
    batch_rows: 2,
    batch_bytes: 64,
    row_bytes: 1000,
};

/// Limits for rows of some size.
const BIG: Limits = Limits {
    row_bytes: 10_000,
    ..SMALL
};

/// All rows of a file.
pub fn rows(path: &Path, sample_by: SampleBy, limits: Limits) -> Result<Vec<Row>, DataError> {
    let mut reader = Reader::open_within(path, sample_by, limits)?;
    let mut rows = Vec::new();
    loop {
        let batch = reader.next_batch()?;
        if batch.is_empty() {
            // The end is the end, however often one asks.
            assert!(reader.next_batch()?.is_empty());
            return Ok(rows);
        }
        assert!(batch.len() <= limits.batch_rows);
        let row = |record: lorafit::data::reader::Record| {
            (
                record.place,
                record.into_object().map_err(|e| e.to_string()),
            )
        };
        rows.extend(batch.into_iter().map(row));
    }
}

/// A file in a folder of its own.
pub struct File {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
}

pub fn file(name: &str, content: impl AsRef<[u8]>) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    File { _dir: dir, path }
}

fn rows_of(name: &str, content: impl AsRef<[u8]>) -> Vec<Row> {
    rows(&file(name, content).path, SampleBy::Line, SMALL).unwrap()
}

/// The error of a file, with its folder taken out.
fn error_of(name: &str, content: impl AsRef<[u8]>) -> String {
    let file = file(name, content);
    let error = rows(&file.path, SampleBy::Line, SMALL)
        .unwrap_err()
        .to_string();
    error.replace(&file.path.display().to_string(), name)
}

fn lines(rows: &[Row]) -> Vec<u64> {
    rows.iter().map(|(place, _)| place.number()).collect()
}

fn objects(rows: Vec<Row>) -> Vec<Value> {
    rows.into_iter()
        .map(|(_, row)| Value::Object(row.unwrap()))
        .collect()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// Row groups of two text columns.
pub fn parquet(groups: &[&[(&str, &str)]], properties: WriterProperties) -> Vec<u8> {
    let schema = "message schema { REQUIRED BYTE_ARRAY a (UTF8); REQUIRED BYTE_ARRAY b (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    for rows in groups {
        let mut group = writer.next_row_group().unwrap();
        let columns = [
            rows.iter()
                .map(|(a, _)| ByteArray::from(*a))
                .collect::<Vec<_>>(),
            rows.iter().map(|(_, b)| ByteArray::from(*b)).collect(),
        ];
        for column in &columns {
            let mut out = group.next_column().unwrap().unwrap();
            out.typed::<ByteArrayType>()
                .write_batch(column, None, None)
                .unwrap();
            out.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

pub fn packed(compression: Compression) -> WriterProperties {
    WriterProperties::builder()
        .set_compression(compression)
        .build()
}

#[test]
fn every_kind_of_file_gives_the_same_rows() {
    let rows = [("1", "é \"x\""), ("", "two\nlines"), ("a,b;c", "\t")];
    let want: Vec<Value> = rows.iter().map(|(a, b)| json!({"a": a, "b": b})).collect();
    let jsonl: String = want.iter().map(|row| format!("{row}\n")).collect();
    let pretty: Vec<String> = want.iter().map(|row| format!("{row:#}")).collect();
    let table = |delimiter: &str, end: &str| {
        let mut text = format!("a{delimiter}b{end}");
        for (a, b) in rows {
            let quoted = |cell: &str| format!("\"{}\"", cell.replace('"', "\"\""));
            text += &format!("{}{delimiter}{}{end}", quoted(a), quoted(b));
        }
        text
    };
    let binary = |c| parquet(&[&rows[..1], &[], &rows[1..]], packed(c));
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("a.jsonl", jsonl.clone().into()),
        ("a.ndjson", format!("\u{feff}{jsonl}").into()),
        ("a.json", jsonl.clone().into()),
        ("a.json", Value::from(want.clone()).to_string().into()),
        ("a.json", format!("{:#}", Value::from(want.clone())).into()),
        ("a.json", pretty.join("\n").into()),
        ("a.csv", table(",", "\n").into()),
        ("a.csv", table(";", "\r\n").into()),
        ("a.csv", format!("\u{feff}{}", table("\t", "\n")).into()),
        ("a.TSV", table("\t", "\n").trim_end_matches('\n').into()),
        ("a.parquet", binary(Compression::UNCOMPRESSED)),
        ("a.parquet", binary(Compression::SNAPPY)),
        ("unnamed", binary(Compression::ZSTD(ZstdLevel::default()))),
        ("unnamed", jsonl.clone().into()),
        ("a.jsonl.gz", gzip(jsonl.as_bytes())),
        (
            "a.json.zst",
            zstd(format!("{:#}", Value::from(want.clone())).as_bytes()),
        ),
        // Told by content, whatever the name says.
        ("a.csv", gzip(table(",", "\n").as_bytes())),
        ("a.jsonl.gz", jsonl.clone().into()),
    ];
    for (name, content) in files {
        assert_eq!(objects(rows_of(name, &content)), want, "{name}");
    }
}

#[test]
fn packed_files_may_have_several_parts() {
    let (a, b) = (b"{\"a\": 1}\n{\"a\":".as_slice(), b" 2}\n".as_slice());
    let want = [json!({"a": 1}), json!({"a": 2})];
    for content in [[gzip(a), gzip(b)].concat(), [zstd(a), zstd(b)].concat()] {
        assert_eq!(objects(rows_of("a.jsonl", content)), want);
    }
}

#[test]
fn rows_say_on_which_line_they_begin() {
    let json = "\u{feff}{\"a\": 1}\r\n\r\n \n[1]\n{\"a\": 2}";
    assert_eq!(lines(&rows_of("a.jsonl", json)), [1, 4, 5]);
    let array = "\n[\n  {\"a\":\n 1}, {\"a\": 2},\n\n{}]";
    assert_eq!(lines(&rows_of("a.json", array)), [3, 4, 6]);
    for end in ["\n", "\r\n"] {
        let table = "\n\na,b\n1,\"x\n\ny\"\n\n2,z\n\"\n\",w".replace('\n', end);
        let rows = rows_of("a.csv", &table);
        assert_eq!(lines(&rows), [4, 8, 9], "{table:?}");
        assert_eq!(rows[0].1.as_ref().unwrap()["b"], format!("x{end}{end}y"));
    }
    let text = "\na\n\n \nb\r\nc";
    assert_eq!(lines(&rows_of("a.txt", text)), [2, 5, 6]);
    let binary = parquet(
        &[&[("1", ""), ("2", "")], &[("3", "")]],
        packed(Compression::SNAPPY),
    );
    let rows = rows_of("a.parquet", binary);
    assert_eq!(rows[2].0, Place::Row(3));
    assert_eq!(rows[2].0.to_string(), "row 3");
}

#[test]
fn text_is_cut_as_asked() {
    let text = "\u{feff}\n a\r\nb\n\n \nc\n";
    let file = file("a.md", text);
    let texts = |sample_by| {
        let rows = rows(&file.path, sample_by, SMALL).unwrap();
        let lines = lines(&rows);
        let texts = objects(rows)
            .into_iter()
            .map(|row| row["text"].as_str().unwrap().to_owned());
        (lines, texts.collect::<Vec<_>>())
    };
    let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        texts(SampleBy::Line),
        (vec![2, 3, 6], owned(&[" a", "b", "c"]))
    );
    assert_eq!(
        texts(SampleBy::Paragraph),
        (vec![2, 6], owned(&[" a\nb", "c"]))
    );
    assert_eq!(
        texts(SampleBy::Document),
        (vec![1], owned(&["\n a\nb\n\n \nc\n"]))
    );
    let blank = self::file("a.txt", " \n\n");
    for sample_by in [SampleBy::Line, SampleBy::Paragraph, SampleBy::Document] {
        assert!(rows(&blank.path, sample_by, SMALL).unwrap().is_empty());
    }
}

#[test]
fn a_bad_row_does_not_hide_the_rows_behind_it() {
    let says = |name, content: &[u8]| -> Vec<String> {
        let row = |(place, row): Row| match row {
            Ok(_) => format!("{place} ok"),
            Err(error) => format!("{place} {error}"),
        };
        rows_of(name, content).into_iter().map(row).collect()
    };
    let bad = says("a.csv", b"a,b\n1\n1,2,3\n\xff,2\n1,2\n1,\"2\n");
    assert!(
        bad[0].starts_with("2 expected 2 cells as in the header, found 1"),
        "{bad:?}"
    );
    assert!(
        bad[1].starts_with("3 expected 2 cells as in the header, found 3"),
        "{bad:?}"
    );
    assert!(
        bad[2].starts_with("4 not UTF-8 text (first wrong byte at 0"),
        "{bad:?}"
    );
    assert_eq!(bad[3], "5 ok");
    assert!(
        bad[4].starts_with("6 a quote that opens in this row"),
        "{bad:?}"
    );
    let bad = says("a.txt", b"\xff\na");
    assert!(bad[0].starts_with("1 not UTF-8 text"), "{bad:?}");
    assert_eq!(bad[1], "2 ok");
    let bad = says("a.jsonl", b"{\"a\": }\n{}\n[]");
    assert!(
        bad[0].starts_with("1 not valid JSON: expected value"),
        "{bad:?}"
    );
    assert_eq!(bad[1], "2 ok");
    assert_eq!(bad[2], "3 a row must be a JSON object, found an array");
}

#[test]
fn quotes_are_read_as_leniently_as_others_do() {
    let row = |cells: &str| objects(rows_of("a.csv", format!("a,b\n{cells}\n"))).remove(0);
    assert_eq!(row("5\" pipe,\"x\"y"), json!({"a": "5\" pipe", "b": "xy"}));
    assert_eq!(row("\"\"\"\",\"\""), json!({"a": "\"", "b": ""}));
    assert_eq!(row(","), json!({"a": "", "b": ""}));
    // What looks like JSON stays text: formats parse it.
    assert_eq!(row("[1],{}"), json!({"a": "[1]", "b": "{}"}));
}

#[test]
fn rows_that_are_too_large_are_refused_where_they_begin() {
    let long = "x".repeat(SMALL.row_bytes);
    let tail = " the row that begins here is larger than 1000 bytes, which no row may be";
    for (name, content, line) in [
        ("a.jsonl", format!("{{}}\n\"{long}\"\n"), 2),
        ("a.json", format!("[{{}},\n\n[\"{long}\n\"]]"), 3),
        ("a.json", format!("{{\n}}\n{{\n\"{long}"), 3),
        ("a.csv", format!("a,b\n1,2\n1,\"{long}\n2,3\n"), 3),
        ("a.csv", format!("a,{long}"), 1),
        ("a.txt", format!("a\n{long}x"), 2),
    ] {
        let error = error_of(name, &content);
        assert!(
            error.starts_with(&format!("{name}:{line}:{tail}")),
            "{error}"
        );
        let error = error_of(&format!("{name}.gz"), gzip(content.as_bytes()));
        assert!(error.contains(tail), "{error}");
    }
    assert_eq!(rows_of("a.txt", &long[1..]).len(), 1);
    assert_eq!(
        rows_of("a.jsonl", format!("{:>1000}\r\n{{}}", "{}")).len(),
        2
    );
    for sample_by in [SampleBy::Paragraph, SampleBy::Document] {
        let file = file("a.txt", "x\n".repeat(SMALL.row_bytes));
        let error = rows(&file.path, sample_by, SMALL).unwrap_err().to_string();
        assert!(error.contains(&format!(":1:{tail}")), "{error}");
    }
    let binary = parquet(&[&[("", ""), (&long, "")]], packed(Compression::SNAPPY));
    let error = error_of("a.parquet", binary);
    assert!(
        error.starts_with(&format!("a.parquet:row 2:{tail}")),
        "{error}"
    );
}

#[test]
fn a_bomb_is_unpacked_no_further_than_its_first_row() {
    // 64 GiB of one line, in many frames.
    let bomb = zstd(&vec![b'x'; 1 << 26]).repeat(1024);
    let error = error_of("a.txt.zst", bomb);
    assert!(
        error.starts_with("a.txt.zst:1: the row that begins here"),
        "{error}"
    );
}

#[test]
fn damaged_files_say_what_is_wrong() {
    let text = "{\"a\": 1}\n".repeat(1000);
    let noise: Vec<u8> = (0..50_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for (packing, whole) in [("gzip", gzip(&noise)), ("zstd", zstd(&noise))] {
        let error = error_of("a.txt", &whole[..whole.len() - 9]);
        let want =
            format!("cannot unpack dataset a.txt: its {packing} data are cut off or damaged");
        assert!(error.starts_with(&want), "{error}");
    }
    let error = error_of("a.jsonl", &gzip(text.as_bytes())[..12]);
    assert!(error.contains("gzip data are cut off"), "{error}");
    assert!(error_of("a.json", "\n[{},").starts_with("a.json:2: the JSON array that starts here"));
    assert_eq!(
        error_of("a.csv", "a,b,a\n1,2,3"),
        "a.csv:1: the header names column `a` twice; rename one of them"
    );
    assert!(error_of("a.csv", b"\n\xff,b\n").starts_with("a.csv:2: the header is not UTF-8"));
    assert!(error_of("a.bin", "hello").starts_with("cannot tell what kind of dataset a.bin is"));
    let binary = parquet(&[&[("1", "2")]], packed(Compression::SNAPPY));
    let error = error_of("a.parquet.gz", gzip(&binary));
    assert!(
        error.contains("packed with gzip; unpack it first"),
        "{error}"
    );
    let error = error_of("a.parquet", &binary[..binary.len() - 1]);
    assert!(error.contains("does not end as Parquet does"), "{error}");
    assert!(error_of("a.parquet", "").contains("cut off"));
    assert!(rows_of("a.json", "").is_empty() && rows_of("a.csv", "a,b").is_empty());
}

#[test]
fn compression_that_is_not_built_in_is_named() {
    let plain = parquet(&[&[("1", "2")]], packed(Compression::UNCOMPRESSED));
    // The number of brotli, 4 in zigzag, wherever the metadata hold that of a column's codec.
    let errors = (plain.len() / 2..plain.len()).filter_map(|at| {
        let mut changed = plain.clone();
        changed[at] = 8;
        let file = file("a.parquet", changed);
        let error = rows(&file.path, SampleBy::Line, SMALL).err()?;
        Some(error.to_string())
    });
    let named = errors.filter(|error| {
        error.ends_with(
            "is compressed with brotli, which is not supported; write the file again with zstd or snappy",
        )
    });
    assert_eq!(named.count(), 2, "one a column");
}

#[test]
fn skipping_counts_what_reading_gives() {
    let texts: Vec<String> = (0..23).map(|i| i.to_string()).collect();
    let pairs: Vec<(&str, &str)> = texts.iter().map(|t| (t.as_str(), "x")).collect();
    let groups: Vec<&[(&str, &str)]> = pairs.chunks(5).collect();
    let binary = parquet(&groups, packed(Compression::SNAPPY));
    let jsonl: String = texts
        .iter()
        .map(|t| format!("{{\"a\": \"{t}\"}}\n\n"))
        .collect();
    let array = format!("[{}]", jsonl.trim().replace("\n\n", ",\n"));
    let table = format!("a\n{}", texts.join("\n\n"));
    for (name, content) in [
        ("a.parquet", binary),
        ("a.jsonl", jsonl.into()),
        ("a.json", array.into()),
        ("a.csv", table.clone().into()),
        ("a.txt", texts.join("\n").into()),
    ] {
        let file = file(name, content);
        let all = rows(&file.path, SampleBy::Line, SMALL).unwrap();
        assert_eq!(all.len(), 23, "{name}");
        for first in [0, 1, 5, 7] {
            for count in [0, 1, 4, 5, 13, 22, 23, 30] {
                let mut reader = Reader::open(&file.path, SampleBy::Line).unwrap();
                let skipped = reader.skip(first).unwrap() + reader.skip(count).unwrap();
                assert_eq!(skipped, (first + count).min(23), "{name}");
                let next = reader.next_batch().unwrap().into_iter().next();
                let next = next.map(|record| (record.place, record.into_object().unwrap()));
                let want = all.get(skipped as usize).cloned();
                assert_eq!(
                    next,
                    want.map(|(place, row)| (place, row.unwrap())),
                    "{name}"
                );
            }
        }
    }
}

#[test]
fn nested_columns_of_pyarrow_are_read_as_they_were_written() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
    let read = |name| objects(rows(&golden.join(name), SampleBy::Line, BIG).unwrap());
    assert_eq!(read("rows.parquet"), read("rows.jsonl"));
}

#[test]
fn readers_and_records_may_go_to_other_threads() {
    fn sent<T: Send>() {}
    sent::<Reader>();
    sent::<lorafit::data::reader::Record>();
}
