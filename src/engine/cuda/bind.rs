//! What must be true of device memory before a kernel is given its addresses.

use crate::plan::{Plan, Reason, Refusal};
use crate::problem::{Argument, Invalid, Rule, TensorDesc, Violation};
use smallvec::SmallVec;

/// Where a tensor lies on a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Address of the buffer's first byte.
    pub(super) buffer: u64,
    /// Element of the buffer at index zero.
    pub(super) offset: usize,
}

impl Place {
    /// Address of the element at index zero.
    pub(super) fn zero(&self, desc: &TensorDesc) -> u64 {
        self.buffer.wrapping_add((self.offset as u64).wrapping_mul(desc.dtype().size() as u64))
    }
}

/// A tensor of a launch with its place.
pub(super) struct Bound {
    pub(super) argument: Argument,
    pub(super) desc: TensorDesc,
    pub(super) place: Place,
    /// Whether the launch writes it.
    pub(super) written: bool,
}

/// The tensors of a launch; as many as text with three adapters has, masks included, without an allocation.
pub(super) type Bindings = SmallVec<[Bound; 20]>;

/// A tensor that its buffer does not hold.
pub(super) fn too_short(argument: Argument, desc: &TensorDesc, offset: usize, bytes: usize) -> Option<Violation> {
    let needed = desc.needed_len(offset);
    let len = bytes / desc.dtype().size();
    let long_enough = needed.is_some_and(|needed| needed <= len);
    (!long_enough).then_some(Violation { argument, rule: Rule::SliceTooShort { needed, len } })
}

/// Addresses of elements that are no multiple of their size, or null.
pub(super) fn addresses(bindings: &Bindings) -> Result<(), Invalid> {
    let mut violations = Vec::new();
    for Bound { argument, desc, place, .. } in bindings.iter().filter(|bound| !bound.desc.is_empty()) {
        let address = place.zero(desc);
        if place.buffer == 0 {
            violations.push(Violation { argument: *argument, rule: Rule::Null });
        } else if !address.is_multiple_of(desc.dtype().size() as u64) {
            violations.push(Violation { argument: *argument, rule: Rule::Address { address, dtype: desc.dtype() } });
        }
    }
    for output in bindings.iter().filter(|bound| bound.written) {
        for other in bindings.iter().filter(|other| !std::ptr::eq(*other, output)) {
            // Of two outputs, the second tells of both.
            let told = other.written && std::ptr::from_ref(other) > std::ptr::from_ref(output);
            if !told && !disjoint(output, other) {
                violations.push(Violation { argument: output.argument, rule: Rule::Aliased { with: other.argument } });
            }
        }
    }
    if violations.is_empty() { Ok(()) } else { Err(Invalid { violations }) }
}

/// Rows that a kernel copies 16 bytes at a time must start at multiples of 16 bytes, and parts in the workspace, too.
pub(super) fn row_starts(bindings: &Bindings, plan: &Plan) -> Result<(), Refusal> {
    let rows = bindings.iter().filter(|bound| {
        (bound.argument.is_of_rows() || bound.argument == Argument::Workspace)
            && !bound.desc.is_empty()
            && !bound.place.zero(&bound.desc).is_multiple_of(16)
    });
    let reasons: Vec<Reason> = rows.map(|bound| Reason::Alignment { argument: bound.argument }).collect();
    if reasons.is_empty() { Ok(()) } else { Err(Refusal { engine: plan.engine(), reasons }) }
}

/// Whether two tensors provably share no byte.
///
/// Either all bytes of one come before all of the other. Or both step through memory by multiples of one period, as
/// parts of one packed tensor do (`[.., 3, heads, head_dim]`), and within it what they touch lies apart.
fn disjoint(a: &Bound, b: &Bound) -> bool {
    let (Some((a_first, a_end)), Some((b_first, b_end))) = (a.extent(), b.extent()) else { return true };
    if a_end <= b_first || b_end <= a_first {
        return true;
    }
    let strides = || a.steps().chain(b.steps());
    strides().any(|(cut, _)| {
        let period = strides().filter(|&(stride, _)| stride >= cut).fold(0, |period, (stride, _)| gcd(period, stride));
        let (a_part, b_part) = (a.reach_below(cut), b.reach_below(cut));
        // Where b's part starts in the period, counted from the start of a's.
        let apart = (b_first as i128 - a_first as i128).rem_euclid(period as i128) as u128;
        apart >= a_part && apart + b_part <= period
    })
}

impl Bound {
    /// First byte touched and the one past the last; nothing if there is no element.
    fn extent(&self) -> Option<(u128, u128)> {
        let (low, high) = self.desc.span()?;
        let size = self.desc.dtype().size() as i128;
        let zero = self.place.zero(&self.desc) as i128;
        let (first, end) = (zero + low as i128 * size, zero + (high as i128 + 1) * size);
        Some((first.max(0) as u128, end.max(0) as u128))
    }

    /// Strides in bytes along which there is more than one element, with the extents.
    fn steps(&self) -> impl Iterator<Item = (u128, u128)> {
        let size = self.desc.dtype().size() as u128;
        let dims = self.desc.shape().iter().zip(self.desc.strides());
        let dims = dims.filter(|&(&extent, &stride)| extent > 1 && stride != 0);
        dims.map(move |(&extent, &stride)| (stride.unsigned_abs() as u128 * size, extent as u128))
    }

    /// Bytes from the first to the last touched by the dimensions whose strides are less than `cut`.
    fn reach_below(&self, cut: u128) -> u128 {
        let inner = self.steps().filter(|&(stride, _)| stride < cut);
        inner.fold(self.desc.dtype().size() as u128, |reach, (stride, extent)| reach + stride * (extent - 1))
    }
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::{Bound, Place, addresses, disjoint, too_short};
    use crate::problem::{Argument, DType, Rule, TensorDesc};

    fn bound(argument: Argument, buffer: u64, offset: usize, desc: TensorDesc) -> Bound {
        let written = matches!(argument, Argument::Out | Argument::Lse);
        Bound { argument, desc, place: Place { buffer, offset }, written }
    }

    /// Every byte of a tensor of at most four dimensions.
    fn bytes(bound: &Bound) -> Vec<i128> {
        let mut at = vec![bound.place.zero(&bound.desc) as i128];
        for (&extent, &stride) in bound.desc.shape().iter().zip(bound.desc.strides()) {
            let step = stride as i128 * bound.desc.dtype().size() as i128;
            at = at.iter().flat_map(|&from| (0..extent as i128).map(move |i| from + i * step)).collect();
        }
        at.iter().flat_map(|&from| from..from + bound.desc.dtype().size() as i128).collect()
    }

    #[test]
    fn parts_of_a_packed_tensor_are_apart() {
        // q, k, v and out of [2, 5, 4, 3, 8]
        let part = |n: usize| {
            let desc = TensorDesc::strided(DType::F16, [2, 5, 3, 8], [5 * 96, 96, 8, 1]);
            bound(Argument::Out, 4096, 24 * n, desc)
        };
        for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            assert_eq!(disjoint(&part(a), &part(b)), a != b, "parts {a} and {b}");
        }
        let wider = TensorDesc::strided(DType::F16, [2, 5, 3, 9], [5 * 96, 96, 8, 1]);
        assert!(!disjoint(&part(1), &bound(Argument::Q, 4096, 0, wider)), "one element too many");
        let backwards = TensorDesc::strided(DType::F16, [2, 5, 3, 8], [5 * 96, -96, 8, 1]);
        assert!(disjoint(&part(1), &bound(Argument::Q, 4096, 4 * 96 + 48, backwards)));
        assert!(!disjoint(&part(1), &bound(Argument::Q, 4096, 4 * 96 + 30, backwards)));
    }

    #[test]
    fn what_is_called_apart_shares_no_byte() {
        let mut state = 7u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let mut apart = 0;
        for _ in 0..20_000 {
            let mut tensor = |argument| {
                let dtype = [DType::F16, DType::F32][draw(2) as usize];
                let shape = [1 + draw(3) as usize, 1 + draw(4) as usize, 1 + draw(4) as usize];
                let strides = [draw(64) as isize - 8, draw(16) as isize - 4, 1 + draw(2) as isize];
                bound(argument, 4096, 64 + draw(48) as usize, TensorDesc::strided(dtype, shape, strides))
            };
            let (a, b) = (tensor(Argument::Out), tensor(Argument::Q));
            if disjoint(&a, &b) {
                apart += 1;
                let taken = bytes(&a);
                assert!(!bytes(&b).iter().any(|byte| taken.contains(byte)), "{:?} and {:?}", a.desc, b.desc);
            }
        }
        assert!(apart > 1000, "{apart} of 20,000 are apart");
    }

    #[test]
    fn every_fault_of_an_address_is_told() {
        let desc = TensorDesc::contiguous(DType::F32, [4, 8]);
        let bindings = [
            bound(Argument::Q, 0, 0, desc),
            bound(Argument::K(0), 4098, 0, desc),
            bound(Argument::V(0), 8192 + 64, 0, desc),
            bound(Argument::Out, 8192, 0, desc),
            bound(Argument::Lse, 8192 + 100, 0, desc),
        ];
        let told = addresses(&bindings.into_iter().collect()).expect_err("three faults").violations;
        let told: Vec<(Argument, &Rule)> = told.iter().map(|told| (told.argument, &told.rule)).collect();
        assert_eq!(
            told,
            [
                (Argument::Q, &Rule::Null),
                (Argument::K(0), &Rule::Address { address: 4098, dtype: DType::F32 }),
                (Argument::Out, &Rule::Aliased { with: Argument::V(0) }),
                (Argument::Lse, &Rule::Aliased { with: Argument::V(0) }),
                (Argument::Lse, &Rule::Aliased { with: Argument::Out }),
            ]
        );
        let empty = bound(Argument::Out, 0, 0, TensorDesc::contiguous(DType::F32, [0, 8]));
        assert_eq!(addresses(&[empty].into_iter().collect()), Ok(()));
        assert!(too_short(Argument::Q, &desc, 1, 32 * 4).is_some());
        assert!(too_short(Argument::Q, &desc, 0, 32 * 4).is_none());
    }
}
