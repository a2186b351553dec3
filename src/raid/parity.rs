//! The mathematics of P and Q.
//!
//! Pure. A row is one block of each column of a stripe: `k` of data, then up to two of parity.
//!
//! ```text
//! P = d0 + d1 + ... + d(k-1)                        + is XOR
//! Q = g^0 d0 + g^1 d1 + ... + g^(k-1) d(k-1)        over GF(256), x^8 + x^4 + x^3 + x^2 + 1, g = 2
//! ```
//!
//! As in "The mathematics of RAID-6" (H. P. Anvin, 2004) and the kernel's md: any two columns of a
//! row are recovered from the others. With one column of data P and Q are copies of it, which is
//! what a mirror is; more than two copies are only made for that.
//!
//! Written here and not taken from a library because it was measured to be faster for the few
//! columns of an array (`docs/architecture.md`), and because the format on disk is then ours.

/// The polynomial without its highest term.
const POLYNOMIAL: u8 = 0x1d;
const WORD_BYTES: usize = 8;
const HIGH_BITS: u64 = 0x8080_8080_8080_8080;
const LOW_BITS: u64 = 0xfefe_fefe_fefe_fefe;
const POLYNOMIALS: u64 = 0x1d1d_1d1d_1d1d_1d1d;

/// `g^n` for each n, and the logarithm of each number but 0.
struct Tables {
    power: [u8; 255],
    log: [u8; 256],
}

const TABLES: Tables = tables();

const fn tables() -> Tables {
    let mut tables = Tables { power: [0; 255], log: [0; 256] };
    let (mut value, mut n): (u8, u8) = (1, 0);
    while n < 255 {
        tables.power[n_usize(n)] = value;
        tables.log[n_usize(value)] = n;
        let carry = value & 0x80 != 0;
        value <<= 1;
        if carry {
            value ^= POLYNOMIAL;
        }
        n += 1;
    }
    tables
}

#[expect(clippy::as_conversions, reason = "a byte fits an index, and From is not const")]
const fn n_usize(n: u8) -> usize {
    n as usize
}

/// `g^n`.
pub fn power(n: usize) -> u8 {
    TABLES.power[n % 255]
}

/// A product in the field.
pub fn multiply(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    power(usize::from(TABLES.log[usize::from(a)]) + usize::from(TABLES.log[usize::from(b)]))
}

/// What gives 1 if multiplied with `a`, which is not 0.
fn inverse(a: u8) -> u8 {
    assert!(a != 0, "0 has no inverse");
    power(255 - usize::from(TABLES.log[usize::from(a)]))
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD_BYTES];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Eight bytes, each multiplied by 2.
const fn doubled(word: u64) -> u64 {
    let high = word & HIGH_BITS;
    // 0xff in each byte whose highest bit was set.
    let mask = (high << 1).wrapping_sub(high >> 7);
    ((word << 1) & LOW_BITS) ^ (mask & POLYNOMIALS)
}

/// Adds `source` to `target`; both have the same length, whole words.
pub fn add(target: &mut [u8], source: &[u8]) {
    assert_eq!(target.len(), source.len(), "columns of one length");
    for (t, s) in target.chunks_exact_mut(WORD_BYTES).zip(source.chunks_exact(WORD_BYTES)) {
        let sum = word(t) ^ word(s);
        t.copy_from_slice(&sum.to_le_bytes());
    }
}

/// Adds `factor` times `source` to `target`.
pub fn add_times(target: &mut [u8], source: &[u8], factor: u8) {
    assert_eq!(target.len(), source.len(), "columns of one length");
    if factor == 1 {
        return add(target, source);
    }
    for (t, s) in target.chunks_exact_mut(WORD_BYTES).zip(source.chunks_exact(WORD_BYTES)) {
        let mut product = 0;
        let (mut times, mut left) = (word(s), factor);
        while left != 0 {
            if left & 1 != 0 {
                product ^= times;
            }
            times = doubled(times);
            left >>= 1;
        }
        let sum = word(t) ^ product;
        t.copy_from_slice(&sum.to_le_bytes());
    }
}

/// Computes the parity of `data`: no, one or two columns.
pub fn encode<D: AsRef<[u8]>, P: AsMut<[u8]>>(data: &[D], parity: &mut [P]) {
    match parity {
        [] => {}
        [p] => {
            let p = p.as_mut();
            p.fill(0);
            data.iter().for_each(|column| add(p, column.as_ref()));
        }
        [p, q] => encode_both(data, p.as_mut(), q.as_mut()),
        copies => {
            assert!(data.len() == 1, "only copies are more than two");
            copies.iter_mut().for_each(|copy| copy.as_mut().copy_from_slice(data[0].as_ref()));
        }
    }
}

/// Horner's rule from the last column on: one doubling a column.
fn encode_both<D: AsRef<[u8]>>(data: &[D], p: &mut [u8], q: &mut [u8]) {
    p.fill(0);
    q.fill(0);
    for column in data.iter().rev() {
        let words = column.as_ref().chunks_exact(WORD_BYTES);
        let both = p.chunks_exact_mut(WORD_BYTES).zip(q.chunks_exact_mut(WORD_BYTES));
        for ((p, q), d) in both.zip(words) {
            let d = word(d);
            let (new_p, new_q) = (word(p) ^ d, doubled(word(q)) ^ d);
            p.copy_from_slice(&new_p.to_le_bytes());
            q.copy_from_slice(&new_q.to_le_bytes());
        }
    }
}

/// More columns are missing than there is parity for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFew;

/// Fills in what is missing of a row of `k` columns of data and the rest of parity, `length` bytes
/// each.
pub fn recover(columns: &mut [Option<Vec<u8>>], k: usize, length: usize) -> Result<(), TooFew> {
    let missing: Vec<usize> = (0..columns.len()).filter(|&at| columns[at].is_none()).collect();
    if missing.len() > columns.len() - k {
        return Err(TooFew);
    }
    if k == 1 {
        let copy = columns.iter().flatten().next().cloned().ok_or(TooFew)?;
        columns.iter_mut().filter(|column| column.is_none()).for_each(|column| {
            *column = Some(copy.clone());
        });
        return Ok(());
    }
    let data: Vec<usize> = missing.iter().copied().filter(|&at| at < k).collect();
    match data[..] {
        [] => {}
        [one] if columns[k].is_some() => columns[one] = Some(by_p(columns, k, length)),
        [one] => columns[one] = Some(by_q(columns, k, one)?),
        [one, other] => {
            let (first, second) = by_both(columns, k, (one, other), length)?;
            columns[one] = Some(first);
            columns[other] = Some(second);
        }
        _ => return Err(TooFew),
    }
    if missing.iter().any(|&at| at >= k) {
        let whole: Vec<&Vec<u8>> = columns[..k].iter().flatten().collect();
        let mut parity = vec![vec![0; length]; columns.len() - k];
        encode(&whole, &mut parity);
        for (at, made) in (k..).zip(parity) {
            columns[at].get_or_insert(made);
        }
    }
    Ok(())
}

fn present(columns: &[Option<Vec<u8>>], k: usize) -> impl Iterator<Item = (usize, &Vec<u8>)> {
    columns[..k].iter().enumerate().filter_map(|(at, column)| Some((at, column.as_ref()?)))
}

fn by_p(columns: &[Option<Vec<u8>>], k: usize, length: usize) -> Vec<u8> {
    let mut found = columns[k].clone().unwrap_or_else(|| vec![0; length]);
    present(columns, k).for_each(|(_, column)| add(&mut found, column));
    found
}

fn by_q(columns: &[Option<Vec<u8>>], k: usize, one: usize) -> Result<Vec<u8>, TooFew> {
    let rest = rest_of_q(columns, k)?;
    let mut found = vec![0; rest.len()];
    add_times(&mut found, &rest, inverse(power(one)));
    Ok(found)
}

/// Q less all data that is there.
fn rest_of_q(columns: &[Option<Vec<u8>>], k: usize) -> Result<Vec<u8>, TooFew> {
    let mut rest = columns.get(k + 1).and_then(Clone::clone).ok_or(TooFew)?;
    present(columns, k).for_each(|(at, column)| add_times(&mut rest, column, power(at)));
    Ok(rest)
}

/// Two equations: a + b = p, g^x a + g^y b = q.
fn by_both(
    columns: &[Option<Vec<u8>>],
    k: usize,
    (x, y): (usize, usize),
    length: usize,
) -> Result<(Vec<u8>, Vec<u8>), TooFew> {
    if columns[k].is_none() {
        return Err(TooFew);
    }
    let p = by_p(columns, k, length);
    let q = rest_of_q(columns, k)?;
    let divisor = inverse(power(x) ^ power(y));
    // a = (q + g^y p) / (g^x + g^y)
    let mut a = vec![0; length];
    add_times(&mut a, &q, divisor);
    add_times(&mut a, &p, multiply(power(y), divisor));
    let mut b = p;
    add(&mut b, &a);
    Ok((a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::Chance;
    use crate::units::convert::to_usize;

    /// Multiplication as it is taught: shift and reduce, bit by bit.
    fn slow_multiply(a: u8, b: u8) -> u8 {
        let (mut product, mut a, mut b) = (0, u16::from(a), b);
        while b != 0 {
            if b & 1 != 0 {
                product ^= a;
            }
            a <<= 1;
            if a & 0x100 != 0 {
                a ^= 0x11d;
            }
            b >>= 1;
        }
        product.to_le_bytes()[0]
    }

    fn slow_parity(data: &[Vec<u8>], m: usize) -> Vec<Vec<u8>> {
        let mut parity = vec![vec![0; data[0].len()]; m];
        for (at, column) in data.iter().enumerate() {
            let factor = (0..at).fold(1, |factor, _| slow_multiply(factor, 2));
            for (n, byte) in column.iter().enumerate() {
                parity[0][n] ^= byte;
                if m == 2 {
                    parity[1][n] ^= slow_multiply(factor, *byte);
                }
            }
        }
        parity
    }

    fn random(chance: &mut Chance, columns: usize, length: usize) -> Vec<Vec<u8>> {
        let byte = |chance: &mut Chance| chance.next_u64().to_le_bytes()[3];
        (0..columns).map(|_| (0..length).map(|_| byte(chance)).collect()).collect()
    }

    #[test]
    fn the_field_agrees_with_the_slow_one() {
        for a in 0..=255 {
            for b in 0..=255 {
                assert_eq!(multiply(a, b), slow_multiply(a, b), "{a} times {b}");
            }
            if a != 0 {
                assert_eq!(multiply(a, inverse(a)), 1);
            }
        }
        let mut sum = vec![3; 256];
        let source: Vec<u8> = (0..=255).collect();
        for factor in 0..=255 {
            let wanted: Vec<u8> =
                sum.iter().zip(&source).map(|(t, s)| t ^ slow_multiply(factor, *s)).collect();
            add_times(&mut sum, &source, factor);
            assert_eq!(sum, wanted, "times {factor}");
        }
    }

    #[test]
    fn golden_bytes() {
        let data = [vec![0x01; 8], vec![0x80; 8], vec![0xff; 8]];
        let mut parity = vec![vec![0; 8]; 2];
        encode(&data, &mut parity);
        // 0x01 + 0x80 + 0xff, and 0x01 + 2 x 0x80 + 4 x 0xff.
        assert_eq!((parity[0][0], parity[1][7]), (0x7e, 0x01 ^ 0x1d ^ 0xdb));
    }

    /// Goal: every loss that the parity bears is recovered, every other is refused. Method: all
    /// subsets of columns, for all widths up to 16, against the slow parity.
    #[test]
    fn every_loss_is_recovered_or_refused() {
        let mut chance = Chance::new(1);
        for (k, m) in (1..=14).flat_map(|k| [(k, 1), (k, 2)]) {
            let data = random(&mut chance, k, 64);
            let mut whole = data.clone();
            whole.extend(slow_parity(&data, m));
            let mut parity = vec![vec![9; 64]; m];
            encode(&data, &mut parity);
            assert_eq!(parity, whole[k..], "{k} + {m}");
            for lost in 0..1_u32 << (k + m).min(10) {
                let mut columns: Vec<Option<Vec<u8>>> = whole
                    .iter()
                    .enumerate()
                    .map(|(at, column)| (lost >> at & 1 == 0).then(|| column.clone()))
                    .collect();
                let met = recover(&mut columns, k, 64);
                if to_usize(u64::from(lost.count_ones())) > m {
                    assert_eq!(met, Err(TooFew));
                } else {
                    assert_eq!(met, Ok(()));
                    let columns: Vec<_> = columns.into_iter().flatten().collect();
                    assert_eq!(columns, whole, "{k} + {m} without {lost:b}");
                }
            }
        }
    }

    #[test]
    fn copies_are_copies() {
        let mut parity = vec![vec![0; 8]; 3];
        encode(&[[7; 8]], &mut parity);
        assert_eq!(parity, vec![vec![7; 8]; 3]);
        let mut columns = vec![None, None, Some(vec![7; 8]), None];
        recover(&mut columns, 1, 8).unwrap();
        assert!(columns.iter().all(|column| column.as_deref() == Some(&[7; 8][..])));
        assert_eq!(recover(&mut [None, None], 1, 8), Err(TooFew));
    }
}
