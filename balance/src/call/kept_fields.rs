//! Header fields, kept as one block of bytes.

use http::{HeaderMap, HeaderName, HeaderValue};

/// Header fields in one allocation. Each field is a byte that is 1 for a sensitive value, the length and the bytes of the name, and the
/// length and the bytes of the value.
#[derive(Debug, Default)]
pub(super) struct Fields(Vec<u8>);

impl Fields {
    /// Creates an empty list with room for fields of this size as RFC 9113 counts it. The 32 bytes that RFC 9113 adds to each field are more
    /// than this list needs.
    pub(super) fn with_capacity(size: usize) -> Self {
        Self(Vec::with_capacity(size))
    }

    pub(super) fn push(&mut self, name: &HeaderName, value: &HeaderValue) {
        self.0.push(value.is_sensitive().into());
        for part in [name.as_str().as_bytes(), value.as_bytes()] {
            self.0.extend_from_slice(&part.len().to_ne_bytes());
            self.0.extend_from_slice(part);
        }
    }

    /// Appends the fields to a map.
    pub(super) fn append_to(&self, map: &mut HeaderMap) {
        let mut rest = &self.0[..];
        while let Some((field, others)) = split_field(rest) {
            rest = others;
            // The bytes of a name and of a value are always valid.
            if let (Ok(name), Ok(mut value)) = (
                HeaderName::from_bytes(field.name),
                HeaderValue::from_bytes(field.value),
            ) {
                value.set_sensitive(field.is_sensitive);
                map.append(name, value);
            }
        }
    }
}

/// The parts of one field.
struct Field<'a> {
    is_sensitive: bool,
    name: &'a [u8],
    value: &'a [u8],
}

/// Splits the bytes into the first field and the other fields.
fn split_field(bytes: &[u8]) -> Option<(Field<'_>, &[u8])> {
    let (is_sensitive, rest) = bytes.split_first()?;
    let (name, rest) = split_part(rest)?;
    let (value, rest) = split_part(rest)?;
    let is_sensitive = *is_sensitive == 1;
    let field = Field {
        is_sensitive,
        name,
        value,
    };
    Some((field, rest))
}

fn split_part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(usize::from_ne_bytes(*length))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn all_fields_are_restored_in_order(
            fields in vec(("[a-z][a-z-]{0,3}", vec(0x20_u8..0x7f, 0..300), any::<bool>()), 0..20),
        ) {
            let mut given = HeaderMap::new();
            for (name, value, is_sensitive) in &fields {
                let mut value = HeaderValue::from_bytes(value).expect("printable ASCII");
                value.set_sensitive(*is_sensitive);
                given.append(name.parse::<HeaderName>().expect("a name"), value);
            }
            let mut restored = HeaderMap::new();
            let mut kept = Fields::default();
            for (name, value) in &given {
                kept.push(name, value);
            }
            kept.append_to(&mut restored);
            let all = |map: &HeaderMap| -> Vec<_> {
                map.iter()
                    .map(|(name, value)| (name.clone(), value.clone(), value.is_sensitive()))
                    .collect()
            };
            prop_assert_eq!(all(&restored), all(&given));
        }
    }
}
