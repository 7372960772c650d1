//! The size of gRPC messages in a body, without their prefixes.

/// Adds up the sizes of the messages in a sequence of frames. The five bytes before each message (gRPC's length prefix) are not counted,
/// as gRFC A66 requires. A message can extend over several frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MessageSize {
    total: u64,
    /// Bytes of the current message that are not read yet.
    left: u32,
    /// The length of the next message, as far as its prefix was read.
    length: u32,
    /// Bytes of the next prefix that were read.
    prefix: u8,
    /// The size of the largest message whose prefix was read.
    largest: u32,
}

impl MessageSize {
    /// Adds the next frame of the body.
    #[inline]
    pub(crate) fn add(&mut self, frame: &[u8]) {
        // Most frames are one whole message.
        if self.prefix == 0
            && self.left == 0
            && let Some(([_, length @ ..], message)) =
                frame.split_first_chunk::<{ PREFIX as usize }>()
            && u32::from_be_bytes(*length) as usize == message.len()
        {
            self.total += message.len() as u64;
            self.largest = self.largest.max(u32::from_be_bytes(*length));
            return;
        }
        self.add_parts(frame);
    }

    fn add_parts(&mut self, mut frame: &[u8]) {
        // Most frames begin with a whole prefix, which is read at once. Byte by byte, it takes five times as long.
        while self.prefix == 0
            && self.left == 0
            && let Some((prefix, rest)) = frame.split_first_chunk::<{ PREFIX as usize }>()
        {
            let [_, length @ ..] = *prefix;
            let length = u32::from_be_bytes(length);
            let part = (length as usize).min(rest.len());
            self.total += part as u64;
            self.largest = self.largest.max(length);
            // `part` is at most `length`, so it fits.
            self.left = length - u32::try_from(part).unwrap_or(length);
            frame = &rest[part..];
        }
        while let Some((first, rest)) = frame.split_first() {
            if self.left > 0 {
                let part = (self.left as usize).min(frame.len());
                self.total += part as u64;
                // `part` is at most `left`, so it fits.
                self.left -= u32::try_from(part).unwrap_or(self.left);
                frame = &frame[part..];
                continue;
            }
            // The first byte of the prefix is the compression flag. It is shifted out by the four bytes of the length.
            self.length = (self.length << 8) | u32::from(*first);
            self.prefix += 1;
            if self.prefix == PREFIX {
                self.largest = self.largest.max(self.length);
                (self.left, self.length, self.prefix) = (self.length, 0, 0);
            }
            frame = rest;
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Returns the size of the largest message that has begun.
    pub(crate) fn largest(&self) -> u32 {
        self.largest
    }
}

/// The length of the prefix of a gRPC message: a flag and a length of four bytes.
const PREFIX: u8 = 5;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body(messages: &[usize]) -> Vec<u8> {
        let mut body = Vec::new();
        for length in messages {
            body.push(1);
            body.extend(u32::try_from(*length).expect("short").to_be_bytes());
            body.extend(vec![7; *length]);
        }
        body
    }

    proptest! {
        #[test]
        fn the_size_excludes_the_prefixes_however_the_body_is_cut(
            messages in proptest::collection::vec(0..400_usize, 0..8),
            frame in 1..700_usize,
        ) {
            let mut size = MessageSize::default();
            for part in body(&messages).chunks(frame) {
                size.add(part);
            }
            prop_assert_eq!(size.total(), messages.iter().sum::<usize>() as u64);
            prop_assert_eq!(size.largest() as usize, messages.iter().copied().max().unwrap_or(0));
        }
    }
}
