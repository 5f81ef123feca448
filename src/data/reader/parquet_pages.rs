//! Pages of Parquet files, looked at before and after they are unpacked.
//!
//! A page is trusted by the `parquet` crate: to be as large as it says, to hold as many values as
//! it says. A few bytes can say gigabytes. What a row may take is bounded here, column by column.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use parquet::basic::{Compression, Encoding, Type};
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use parquet::file::reader::RowGroupReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::{ColumnDescriptor, Type as SchemaType};

use super::parquet_thrift::{PageHeader, Thrift};

/// Largest page when unpacked. Writers aim at 1 MiB to 100 MB.
const MAX_PAGE_BYTES: u64 = 256 << 20;
/// Largest page of a column packed with the old LZ4, which unpacks to at most 255 times as much.
const MAX_LZ4_BYTES: u64 = 8 << 20;
/// Deflate cannot pack better than this.
const MAX_DEFLATE_RATIO: u64 = 1032;
/// Largest header of a page: statistics may hold two values.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Largest page in which each value may repeat the beginning of the one before.
const MAX_PREFIXED_BYTES: usize = 4 << 20;
/// Most values of one column in one row.
const MAX_ROW_VALUES: u64 = 2 << 20;
/// Most bytes that the values of one column in one row may come to by way of a dictionary.
const MAX_DICTIONARY_BYTES: u64 = 1 << 30;

fn fault(message: impl Into<String>) -> ParquetError {
    ParquetError::General(message.into())
}

/// Walks over the headers of a column's pages, and refuses pages that unpack to too much.
pub(super) fn check_headers(file: &File, column: &ColumnChunkMetaData) -> Result<()> {
    let (mut at, length) = column.byte_range();
    let end = at.saturating_add(length);
    if end > file.metadata()?.len() {
        return Err(fault("a column reaches beyond the end of the file"));
    }
    while at < end {
        let header = read_header(file, at, end - at)?;
        let (packed, unpacked) =
            match (u64::try_from(header.packed), u64::try_from(header.unpacked)) {
                (Ok(packed), Ok(unpacked)) if packed <= end - at => (packed, unpacked),
                _ => return Err(fault("a page has an impossible size")),
            };
        let start = at + header.length as u64;
        let is_too_large = unpacked > MAX_PAGE_BYTES
            || match column.compression() {
                Compression::GZIP(_) => unpacks_to_too_much(file, start, packed)?,
                Compression::LZ4 => packed > MAX_LZ4_BYTES,
                _ => packed > MAX_PAGE_BYTES,
            };
        if is_too_large {
            return Err(fault(format!(
                "a page of column `{}` is larger than {} MiB; write the file again with smaller pages",
                column.column_path().string(),
                MAX_PAGE_BYTES >> 20
            )));
        }
        at = start.saturating_add(packed);
    }
    Ok(())
}

fn read_header(file: &File, at: u64, available: u64) -> Result<PageHeader> {
    let mut length = 1024;
    loop {
        let mut bytes = Vec::new();
        let mut reader = file;
        reader.seek(SeekFrom::Start(at))?;
        reader.take(length.min(available)).read_to_end(&mut bytes)?;
        if let Some(header) = PageHeader::read(&bytes) {
            return Ok(header);
        }
        if length >= available || length >= MAX_HEADER_BYTES {
            return Err(fault("a page header is damaged"));
        }
        length *= 16;
    }
}

/// The size a gzip page says is not what it unpacks to, so that large ones are counted.
fn unpacks_to_too_much(file: &File, at: u64, packed: u64) -> Result<bool> {
    if packed <= MAX_PAGE_BYTES / MAX_DEFLATE_RATIO {
        return Ok(false);
    }
    let mut file = file;
    file.seek(SeekFrom::Start(at))?;
    let unpacked = flate2::read::MultiGzDecoder::new(file.take(packed));
    let count = std::io::copy(&mut unpacked.take(MAX_PAGE_BYTES + 1), &mut std::io::sink())?;
    Ok(count > MAX_PAGE_BYTES)
}

/// A row group whose pages are looked at as they are read.
pub(super) struct CheckedGroup<'a> {
    /// The row group.
    pub group: Box<dyn RowGroupReader + 'a>,
}

impl RowGroupReader for CheckedGroup<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.group.metadata()
    }

    fn num_columns(&self) -> usize {
        self.group.num_columns()
    }

    fn get_column_page_reader(&self, i: usize) -> Result<Box<dyn PageReader>> {
        Ok(Box::new(CheckedPages {
            pages: self.group.get_column_page_reader(i)?,
            check: PageCheck::new(self.metadata().column(i).column_descr()),
        }))
    }

    fn get_column_bloom_filter(&self, i: usize) -> Option<&Sbbf> {
        self.group.get_column_bloom_filter(i)
    }

    fn get_row_iter(&self, projection: Option<SchemaType>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// The pages of one column of a row group.
struct CheckedPages {
    pages: Box<dyn PageReader>,
    check: PageCheck,
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            self.check.page(page)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }
}

impl Iterator for CheckedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

/// What is known of a column's pages so far.
struct PageCheck {
    physical_type: Type,
    max_rep_level: i16,
    has_def_levels: bool,
    /// Bytes of the longest value of the dictionary.
    longest: u64,
    /// Values of the row that the next value belongs to, unless it begins one.
    row_values: u64,
}

impl PageCheck {
    fn new(column: &ColumnDescriptor) -> Self {
        Self {
            physical_type: column.physical_type(),
            max_rep_level: column.max_rep_level(),
            has_def_levels: column.max_def_level() > 0,
            longest: 0,
            row_values: 0,
        }
    }

    fn page(&mut self, page: &Page) -> Result<()> {
        match page {
            Page::DictionaryPage {
                buf, num_values, ..
            } => self.dictionary(buf, u64::from(*num_values)),
            Page::DataPage {
                buf,
                num_values,
                encoding,
                rep_level_encoding,
                ..
            } => {
                let mut values = &buf[..];
                if self.max_rep_level > 0 {
                    if *rep_level_encoding != Encoding::RLE {
                        return Err(fault("repetition levels are not in the RLE encoding"));
                    }
                    let levels = take_levels(&mut values)?;
                    self.row_lengths(levels, u64::from(*num_values))?;
                }
                if self.has_def_levels {
                    take_levels(&mut values)?;
                }
                check_values(values, *encoding, u64::from(*num_values))
            }
            Page::DataPageV2 {
                buf,
                num_values,
                encoding,
                def_levels_byte_len,
                rep_levels_byte_len,
                ..
            } => {
                let levels = buf.get(..*rep_levels_byte_len as usize);
                let start = *rep_levels_byte_len as usize + *def_levels_byte_len as usize;
                let (Some(levels), Some(values)) = (levels, buf.get(start..)) else {
                    return Err(fault("a page is shorter than its levels"));
                };
                if self.max_rep_level > 0 {
                    self.row_lengths(levels, u64::from(*num_values))?;
                }
                check_values(values, *encoding, u64::from(*num_values))
            }
        }
    }

    /// Memory is reserved for as many values as a dictionary says it has.
    fn dictionary(&mut self, buf: &[u8], num_values: u64) -> Result<()> {
        if num_values > buf.len() as u64 {
            return Err(fault("a dictionary has fewer values than it says"));
        }
        self.longest = 0;
        if self.physical_type == Type::BYTE_ARRAY {
            let mut rest = buf;
            while let Some((length, behind)) = rest.split_first_chunk() {
                let length = u32::from_le_bytes(*length);
                self.longest = self.longest.max(u64::from(length));
                rest = behind.get(length as usize..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// Counts the values of rows by their repetition levels, which are runs of equal or packed
    /// ones; a level of zero begins a row.
    fn row_lengths(&mut self, levels: &[u8], num_values: u64) -> Result<()> {
        let width = 16 - self.max_rep_level.leading_zeros() as usize;
        let cut_off = || fault("repetition levels are cut off");
        let mut runs = Thrift::new(levels);
        let mut left = num_values;
        while left > 0 {
            let header = runs.varint().ok_or_else(cut_off)?;
            let count = header >> 1;
            if header & 1 == 0 {
                let level = runs.take_up_to(width.div_ceil(8));
                let count = count.min(left);
                self.count(level.iter().all(|byte| *byte == 0), count)?;
                left -= count;
            } else {
                // Groups of eight; writers may cut the last one short.
                let bytes = count.saturating_mul(width as u64);
                let packed = runs.take_up_to(usize::try_from(bytes).unwrap_or(usize::MAX));
                let count = count.saturating_mul(8).min(left);
                for i in 0..count.min(packed.len() as u64 * 8 / width as u64) as usize {
                    let is_set = |bit: usize| packed[bit / 8] & (1 << (bit % 8)) != 0;
                    let is_new_row = !(i * width..(i + 1) * width).any(is_set);
                    self.count(is_new_row, 1)?;
                }
                left -= count;
            }
        }
        Ok(())
    }

    /// Counts values, each of which begins a row, or none.
    fn count(&mut self, is_new_row: bool, values: u64) -> Result<()> {
        self.row_values = match is_new_row {
            true if values > 0 => 1,
            true => self.row_values,
            false => self.row_values + values,
        };
        self.check_row()
    }

    fn check_row(&self) -> Result<()> {
        if self.row_values > MAX_ROW_VALUES
            || self.row_values.saturating_mul(self.longest) > MAX_DICTIONARY_BYTES
        {
            return Err(fault(format!(
                "a row has more than {MAX_ROW_VALUES} values in one column, or too long ones"
            )));
        }
        Ok(())
    }
}

/// Takes levels with their length before them.
fn take_levels<'a>(values: &mut &'a [u8]) -> Result<&'a [u8]> {
    let split = values
        .split_first_chunk()
        .and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
    let (levels, rest) = split.ok_or_else(|| fault("a page is shorter than its levels"))?;
    *values = rest;
    Ok(levels)
}

/// Memory is reserved for as many values as these encodings say they hold.
fn check_values(values: &[u8], encoding: Encoding, num_values: u64) -> Result<()> {
    let is_prefixed = encoding == Encoding::DELTA_BYTE_ARRAY;
    if !is_prefixed && encoding != Encoding::DELTA_LENGTH_BYTE_ARRAY {
        return Ok(());
    }
    if is_prefixed && values.len() > MAX_PREFIXED_BYTES {
        return Err(fault(
            "a page in the encoding DELTA_BYTE_ARRAY is too large; write the file again without it",
        ));
    }
    let behind = behind_integers(values, num_values);
    let is_sound = match behind {
        Some(behind) if is_prefixed => behind_integers(behind, num_values).is_some(),
        behind => behind.is_some(),
    };
    if is_sound {
        Ok(())
    } else {
        Err(fault("the lengths of a page's values are damaged"))
    }
}

/// What stands behind integers in the encoding `DELTA_BINARY_PACKED`; none where there are more
/// than `most` of them, or they are cut off.
fn behind_integers(bytes: &[u8], most: u64) -> Option<&[u8]> {
    let mut header = Thrift::new(bytes);
    let block = header.varint()?;
    let minis = header.varint()?;
    let count = header.varint()?;
    header.int()?;
    if count > most {
        return None;
    }
    let mini = block.checked_div(minis)?;
    let mut left = count.saturating_sub(1);
    while left > 0 && mini > 0 {
        header.int()?;
        let widths = header.take_up_to(usize::try_from(minis).ok()?);
        for width in widths {
            if left > 0 {
                let bits = mini.checked_mul(u64::from(*width))?;
                header.take_up_to(usize::try_from(bits / 8).ok()?);
                left = left.saturating_sub(mini);
            }
        }
    }
    bytes.get(header.position()..)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(max_rep_level: i16) -> PageCheck {
        PageCheck {
            physical_type: Type::INT32,
            max_rep_level,
            has_def_levels: false,
            longest: 0,
            row_values: 0,
        }
    }

    /// A run of equal levels.
    fn run(count: u64, level: u8) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut header = count << 1;
        while header >= 0x80 {
            bytes.push(header as u8 | 0x80);
            header >>= 7;
        }
        bytes.extend([header as u8, level]);
        bytes
    }

    #[test]
    fn values_of_a_row_are_counted_over_runs_and_pages() {
        let mut one = check(1);
        // Two rows, one of five values; eight packed levels that begin with two more of them.
        let levels = [run(2, 0), run(4, 1), vec![0b11, 0b1111_0011]].concat();
        one.row_lengths(&levels, 14).unwrap();
        assert_eq!(one.row_values, 5);
        one.row_lengths(&run(3, 1), 3).unwrap();
        assert_eq!(one.row_values, 8);
        assert!(one.row_lengths(&run(3, 1), 4).is_err(), "cut off");

        let mut huge = check(1);
        let levels = [run(1, 0), run(1 << 31, 1)].concat();
        assert!(huge.row_lengths(&levels, (1 << 31) + 1).is_err());
    }

    #[test]
    fn dictionaries_and_lengths_that_lie_are_refused() {
        assert!(check(0).dictionary(&[0; 8], 1 << 30).is_err());
        let delta = Encoding::DELTA_LENGTH_BYTE_ARRAY;
        // 128 values a block, 4 small blocks, 2 values: 3 and 3, then what is not looked at.
        let lengths = [128, 1, 4, 2, 6, 0, 0, 0, 0, 0, b'a'];
        assert!(check_values(&lengths, delta, 2).is_ok());
        assert_eq!(behind_integers(&lengths, 2), Some(&b"a"[..]));
        assert!(check_values(&lengths, delta, 1).is_err());
        assert!(check_values(&lengths[..3], delta, 2).is_err());
    }
}
