//! Which tiles matrix units work on: a table from the shape of a problem and the unit to how it is cut.
//!
//! Rows are tried from the top; the first one that fits is taken, unless a plan has the number of one that was measured on
//! its device.

use cubecl::ir::HardwareProperties;

use super::matrix_units::{PLANE, Unit};

/// How a matrix product is cut: a cube makes `m × n` elements from blocks of `k` summed ones, with `planes_m × planes_n`
/// planes; `group` rows of tiles are visited together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProductTile {
    pub(crate) m: u32,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) planes_m: u32,
    pub(crate) planes_n: u32,
    pub(crate) group: u32,
}

impl ProductTile {
    pub(crate) fn planes(&self) -> u32 {
        self.planes_m * self.planes_n
    }

    pub(crate) fn units(&self) -> u32 {
        self.planes() * PLANE
    }

    /// Rows of a plane.
    pub(crate) fn plane_m(&self) -> u32 {
        self.m / self.planes_m
    }

    /// Columns of a plane.
    pub(crate) fn plane_n(&self) -> u32 {
        self.n / self.planes_n
    }

    /// Vectors that a unit reads of a block of the left operand.
    pub(crate) fn left_slots(&self, vector: u32) -> u32 {
        self.m * self.k / vector / self.units()
    }

    /// Vectors that a unit reads of a block of the right operand.
    pub(crate) fn right_slots(&self, vector: u32) -> u32 {
        self.n * self.k / vector / self.units()
    }

    /// Sums of a row of the patch through which fragments are stored; the last ones put rows in different banks.
    pub(crate) fn patch_row(&self) -> u32 {
        self.plane_n() + 4
    }

    /// Cubes for a product.
    pub(crate) fn cubes(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.m as usize) * n.div_ceil(self.n as usize)
    }
}

/// A row of the table for products.
struct Product {
    /// Edge of the unit's fragments.
    edge: u32,
    /// Rows of the result up to which the tile is for.
    most_m: usize,
    /// Cubes per processor from which on it is for.
    least_cubes: usize,
    tile: ProductTile,
}

const ANY: usize = usize::MAX;

/// As many rows as the longer table has.
pub(crate) const ROWS: u32 = 7;

const PRODUCTS: [Product; ROWS as usize] = [
    // Tensor cores. Few rows: reading the other operand is what takes time.
    Product { edge: 16, most_m: 16, least_cubes: 0, tile: tile([16, 128, 64], [1, 4], 1) },
    Product { edge: 16, most_m: 48, least_cubes: 0, tile: tile([32, 128, 64], [1, 4], 1) },
    // 64 × 64 elements per plane read the least shared memory per product.
    Product { edge: 16, most_m: ANY, least_cubes: 1, tile: tile([128, 256, 32], [2, 4], 8) },
    Product { edge: 16, most_m: ANY, least_cubes: 1, tile: tile([128, 128, 32], [2, 4], 8) },
    Product { edge: 16, most_m: ANY, least_cubes: 0, tile: tile([64, 64, 32], [2, 2], 8) },
    // Simdgroup matrices, with 32 KB of shared memory.
    Product { edge: 8, most_m: 16, least_cubes: 0, tile: tile([16, 64, 32], [1, 4], 1) },
    Product { edge: 8, most_m: ANY, least_cubes: 0, tile: tile([64, 64, 16], [2, 2], 8) },
];

const fn tile([m, n, k]: [u32; 3], [planes_m, planes_n]: [u32; 2], group: u32) -> ProductTile {
    ProductTile { m, n, k, planes_m, planes_n, group }
}

/// The tile for `batches` products of `m × n` elements.
pub(crate) fn product(
    hardware: &HardwareProperties,
    unit: &Unit,
    m: usize,
    n: usize,
    batches: usize,
) -> Option<ProductTile> {
    let processors = hardware.num_streaming_multiprocessors.unwrap_or(16) as usize;
    let fits = |row: &&Product| {
        row.edge == unit.edge
            && m <= row.most_m
            && row.tile.cubes(m, n).saturating_mul(batches) >= row.least_cubes * processors
            && shared_bytes(&row.tile, unit) <= hardware.max_shared_memory_size
    };
    PRODUCTS.iter().find(fits).map(|row| row.tile)
}

/// The tile with a number, if the unit and the device can have it.
pub(crate) fn tuned_product(hardware: &HardwareProperties, unit: &Unit, tile: Option<u32>) -> Option<ProductTile> {
    let row = PRODUCTS.get(tile? as usize)?;
    let fits = row.edge == unit.edge && shared_bytes(&row.tile, unit) <= hardware.max_shared_memory_size;
    fits.then_some(row.tile)
}

/// How attention is cut: a plane has `rows` rows of fragments, with as many queries as their edge each, and blocks of
/// `keys` keys pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct AttentionTile {
    pub(crate) planes: u32,
    pub(crate) rows: u32,
    pub(crate) keys: u32,
    /// Whether values take the place of the keys in shared memory.
    pub(crate) shares_stage: bool,
}

impl AttentionTile {
    pub(crate) fn units(&self) -> u32 {
        self.planes * PLANE
    }

    /// Queries of a cube.
    pub(crate) fn queries(&self, unit: &Unit) -> u32 {
        self.planes * self.rows * unit.edge
    }

    /// Vectors of a staged row of some head dims; the last one puts rows in different banks.
    pub(crate) fn key_row(&self, unit: &Unit, dims: u32) -> u32 {
        dims / unit.vector() + 1
    }

    /// Vectors of staged keys and values.
    pub(crate) fn stage_vectors(&self, unit: &Unit, d: u32, e: u32) -> u32 {
        let [keys, values] = [d, e].map(|dims| self.keys * self.key_row(unit, dims));
        if self.shares_stage { keys.max(values) } else { keys + values }
    }

    /// Scores of a row of the patch of a plane.
    pub(crate) fn patch_row(&self) -> u32 {
        self.keys + 8
    }

    /// Weights of a row.
    pub(crate) fn weight_row(&self, unit: &Unit) -> u32 {
        self.keys + unit.vector()
    }
}

/// A row of the table for attention.
struct Heads {
    /// Edge of the unit's fragments.
    edge: u32,
    /// Head dims up to which the tile is for.
    most_dims: u32,
    tile: AttentionTile,
}

const HEADS: [Heads; 5] = [
    // Tensor cores. Two rows of fragments use every fragment of keys and values twice; sums of 256 dims leave room for one.
    // Blocks of 64 keys spill registers at 64 dims.
    Heads { edge: 16, most_dims: 128, tile: heads(4, 2, 32, false) },
    Heads { edge: 16, most_dims: 256, tile: heads(4, 1, 32, false) },
    // Simdgroup matrices, with 32 KB of shared memory.
    Heads { edge: 8, most_dims: 64, tile: heads(4, 2, 16, true) },
    Heads { edge: 8, most_dims: 128, tile: heads(2, 2, 16, true) },
    Heads { edge: 8, most_dims: 256, tile: heads(1, 2, 16, true) },
];

const fn heads(planes: u32, rows: u32, keys: u32, shares_stage: bool) -> AttentionTile {
    AttentionTile { planes, rows, keys, shares_stage }
}

/// Head dims are multiples of this.
const DIMS: usize = 16;

/// The tile for heads with `d` dims of queries and keys and `e` of values.
pub(crate) fn attention(hardware: &HardwareProperties, unit: &Unit, d: usize, e: usize) -> Option<AttentionTile> {
    (0..HEADS.len() as u32).find_map(|row| tuned_attention(hardware, unit, d, e, Some(row)))
}

/// The tile with a number, if the unit, the heads and the device can have it.
pub(crate) fn tuned_attention(
    hardware: &HardwareProperties,
    unit: &Unit,
    d: usize,
    e: usize,
    tile: Option<u32>,
) -> Option<AttentionTile> {
    let row = HEADS.get(tile? as usize)?;
    let (d, e) = dims(d, e)?;
    let fits = row.edge == unit.edge
        && d.max(e) <= row.most_dims
        && attention_bytes(&row.tile, unit, d, e) <= hardware.max_shared_memory_size;
    fits.then_some(row.tile)
}

/// Head dims that tiles can have.
fn dims(d: usize, e: usize) -> Option<(u32, u32)> {
    let is_whole = d.is_multiple_of(DIMS) && e.is_multiple_of(DIMS) && d > 0 && e > 0;
    is_whole.then_some((u32::try_from(d).ok()?, u32::try_from(e).ok()?))
}

/// Shared memory of a cube.
fn attention_bytes(tile: &AttentionTile, unit: &Unit, d: u32, e: u32) -> usize {
    let vectors = tile.queries(unit) * tile.key_row(unit, d) + tile.stage_vectors(unit, d, e);
    let bytes = unit.element.bytes() as u32;
    let weights = tile.queries(unit) * tile.weight_row(unit);
    let patches = tile.planes * unit.edge * tile.patch_row();
    ((vectors * unit.vector() + weights) * bytes + 4 * patches) as usize
}

/// Shared memory of a cube, with either layout of the right operand.
fn shared_bytes(tile: &ProductTile, unit: &Unit) -> usize {
    let vector = unit.vector();
    let right = (tile.n * (tile.k + vector)).max(tile.k * (tile.n + vector));
    let staged = 2 * (tile.m * (tile.k + vector) + right) * unit.element.bytes() as u32;
    let patch = 4 * tile.planes() * unit.edge * tile.patch_row();
    // Where nothing is freed, both are there.
    (staged + patch) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use ltxc_ir::DType;

    fn units(edge: u32) -> Vec<Unit> {
        let elements = if edge == 16 { [DType::BF16, DType::F16] } else { [DType::F16, DType::F32] };
        elements.map(|element| Unit { element, edge, planes_meet: edge == 16 }).to_vec()
    }

    #[test]
    fn heads_divide_evenly() {
        for row in &HEADS {
            let tile = &row.tile;
            for unit in units(row.edge) {
                // Units share a row of scores in vectors of 4, and words of the narrowest result.
                assert_eq!(tile.keys / 4 % (PLANE / unit.edge), 0, "{tile:?}");
                assert_eq!((tile.keys % unit.edge, unit.edge * DIMS as u32 / 4 % PLANE), (0, 0), "{tile:?}");
                // Chunks of columns are as wide as head dims go.
                assert_eq!(tile.keys as usize % DIMS, 0, "{tile:?}");
                let bytes = attention_bytes(tile, &unit, row.most_dims, row.most_dims);
                let most = if row.edge == 16 { 99 << 10 } else { 32 << 10 };
                // Simdgroups have no room for 256 dims of f32.
                assert!(
                    bytes <= most || (unit.element, row.most_dims) == (DType::F32, 256),
                    "{tile:?} {unit:?} {bytes}"
                );
            }
        }
    }

    #[test]
    fn tiles_divide_evenly() {
        for row in &PRODUCTS {
            let tile = &row.tile;
            for unit in units(row.edge) {
                let (vector, units) = (unit.vector(), tile.units());
                let edges = [tile.plane_m(), tile.plane_n(), tile.k].map(|extent| extent % row.edge);
                assert_eq!(edges, [0; 3], "{tile:?}");
                assert_eq!((tile.m % tile.planes_m, tile.n % tile.planes_n), (0, 0), "{tile:?}");
                // Units have whole rows of both blocks in common, whichever axis is last.
                for (rows, vectors) in [(tile.m, tile.k / vector), (tile.n, tile.k / vector), (tile.k, tile.n / vector)]
                {
                    assert_eq!((units % vectors, rows % (units / vectors)), (0, 0), "{tile:?} {unit:?}");
                }
                // Words of the narrowest result are shared evenly, too.
                assert_eq!(unit.edge * tile.plane_n() / 4 % PLANE, 0, "{tile:?}");
                // Rows of a patch begin at multiples of 16 bytes.
                assert_eq!(tile.patch_row() % 4, 0, "{tile:?}");
                let most = if row.edge == 16 { 99 << 10 } else { 32 << 10 };
                assert!(shared_bytes(tile, &unit) <= most, "{tile:?} {unit:?} {}", shared_bytes(tile, &unit));
            }
        }
    }
}
