//! Values of Parquet as JSON.

use parquet::data_type::Decimal;
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

const MILLIS_PER_DAY: i64 = 86_400_000;

/// A row as a JSON object.
///
/// Dates and times become ISO 8601 text, decimals become text with all their digits, bytes become
/// text where they are UTF-8 and null where not (images, audio), and so do numbers that are not
/// finite.
pub(super) fn object(row: &Row) -> Map<String, Value> {
    row.get_column_iter()
        .map(|(name, field)| (name.clone(), value(field)))
        .collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::Byte(value) => Value::from(*value),
        Field::Short(value) => Value::from(*value),
        Field::Int(value) => Value::from(*value),
        Field::Long(value) => Value::from(*value),
        Field::UByte(value) => Value::from(*value),
        Field::UShort(value) => Value::from(*value),
        Field::UInt(value) => Value::from(*value),
        Field::ULong(value) => Value::from(*value),
        Field::Float16(value) => float(f64::from(*value)),
        // The shortest decimal that means this number, not its 64 bits.
        Field::Float(value) => float(value.to_string().parse().unwrap_or(f64::NAN)),
        Field::Double(value) => float(*value),
        Field::Decimal(value) => decimal(value),
        Field::Str(value) => Value::from(value.as_str()),
        Field::Bytes(value) => std::str::from_utf8(value.data()).map_or(Value::Null, Value::from),
        Field::Date(days) => Value::from(date(i64::from(*days))),
        Field::TimeMillis(millis) => Value::from(time(i64::from(*millis) * 1000)),
        Field::TimeMicros(micros) => Value::from(time(*micros)),
        Field::TimestampMillis(millis) => Value::from(timestamp(
            millis.div_euclid(MILLIS_PER_DAY),
            millis.rem_euclid(MILLIS_PER_DAY) * 1000,
        )),
        Field::TimestampMicros(micros) => Value::from(timestamp(
            micros.div_euclid(MILLIS_PER_DAY * 1000),
            micros.rem_euclid(MILLIS_PER_DAY * 1000),
        )),
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| (key_text(key), value(field));
            Value::Object(map.entries().iter().map(entry).collect())
        }
    }
}

/// The key of a map: JSON has text only.
fn key_text(key: &Field) -> String {
    match value(key) {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

fn float(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// All the digits, as text; null where there are more than 128 bits.
fn decimal(decimal: &Decimal) -> Value {
    let data = decimal.data();
    if data.len() > 16 {
        return Value::Null;
    }
    let is_negative = data.first().is_some_and(|byte| byte & 0x80 != 0);
    let mut bytes = [if is_negative { 0xff } else { 0 }; 16];
    bytes[16 - data.len()..].copy_from_slice(data);
    let unscaled = i128::from_be_bytes(bytes);
    let Ok(scale @ 0..=38) = usize::try_from(decimal.scale()) else {
        return Value::Null;
    };
    let sign = if unscaled < 0 { "-" } else { "" };
    let digits = format!("{:0width$}", unscaled.unsigned_abs(), width = scale + 1);
    let (whole, fraction) = digits.split_at(digits.len() - scale);
    let point = if scale > 0 { "." } else { "" };
    Value::from(format!("{sign}{whole}{point}{fraction}"))
}

fn timestamp(days: i64, micros: i64) -> String {
    format!("{}T{}", date(days), time(micros))
}

/// Microseconds since midnight, with the fraction of a second where there is one.
fn time(micros: i64) -> String {
    let seconds = micros.div_euclid(1_000_000);
    let fraction = micros.rem_euclid(1_000_000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let text = format!("{hours:02}:{minutes:02}:{:02}", seconds % 60);
    match fraction {
        0 => text,
        fraction => format!("{text}.{fraction:06}"),
    }
}

/// Days since 1970-01-01, in the proleptic Gregorian calendar.
///
/// # References
/// Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`: years begin
/// in March, so that the leap day is the last one; an era is 400 years.
fn date(days: i64) -> String {
    const DAYS_PER_ERA: i64 = 146_097;
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(DAYS_PER_ERA), days.rem_euclid(DAYS_PER_ERA));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!(
        "{:04}-{month:02}-{day_of_month:02}",
        year + era * 400 + carry
    )
}

/// About how many bytes a row takes in memory.
pub(super) fn bytes(row: &Row) -> usize {
    let cells = row.get_column_iter();
    let cell =
        |(name, field): (&String, &Field)| size_of::<(String, Field)>() + name.len() + held(field);
    cells.map(cell).sum()
}

/// What a value holds outside of itself.
fn held(field: &Field) -> usize {
    let whole = |field: &Field| size_of::<Field>() + held(field);
    match field {
        Field::Str(text) => text.len(),
        Field::Bytes(bytes) => bytes.len(),
        Field::Group(row) => bytes(row),
        Field::ListInternal(list) => list.elements().iter().map(whole).sum(),
        Field::MapInternal(map) => {
            let entry = |(key, value): &(Field, Field)| whole(key) + whole(value);
            map.entries().iter().map(entry).sum()
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use parquet::data_type::ByteArray;

    use super::*;

    #[test]
    fn dates_and_times_are_iso_8601() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(19_782), "2024-02-29");
        assert_eq!(date(-1), "1969-12-31");
        assert_eq!(date(-719_468), "0000-03-01");
        assert_eq!(
            value(&Field::TimestampMillis(-1)),
            "1969-12-31T23:59:59.999000"
        );
        assert_eq!(
            value(&Field::TimestampMicros(1_709_164_800_000_000)),
            "2024-02-29T00:00:00"
        );
        assert_eq!(value(&Field::TimeMillis(3_661_000)), "01:01:01");
        // The ends of the type, which no calendar has, are text too.
        for field in [
            Field::Date(i32::MIN),
            Field::TimestampMillis(i64::MAX),
            Field::TimeMicros(i64::MIN),
        ] {
            assert!(value(&field).is_string());
        }
    }

    #[test]
    fn decimals_keep_their_digits() {
        let text = |unscaled, scale| decimal(&Decimal::from_i32(unscaled, 9, scale));
        assert_eq!(text(12_345, 2), "123.45");
        assert_eq!(text(-5, 3), "-0.005");
        assert_eq!(text(7, 0), "7");
        assert_eq!(text(7, -1), Value::Null);
        let wide = Decimal::from_bytes(ByteArray::from(vec![1; 17]), 40, 0);
        assert_eq!(decimal(&wide), Value::Null);
    }

    #[test]
    fn what_json_has_not_becomes_null_or_text() {
        assert_eq!(value(&Field::Float(0.1)), 0.1);
        assert_eq!(value(&Field::Float(f32::NAN)), Value::Null);
        assert_eq!(value(&Field::Double(f64::INFINITY)), Value::Null);
        assert_eq!(value(&Field::Bytes(ByteArray::from("é"))), "é");
        assert_eq!(value(&Field::Bytes(vec![0xff].into())), Value::Null);
    }
}
