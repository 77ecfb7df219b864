//! Sizes of tiles: the one place where they depend on the device.

use cubecl::prelude::*;
use ltxc_ir::plan::{Kernel, MatrixUnit};
use ltxc_ir::{DType, TensorType};

use super::call::Call;
use super::matrix_units::{self, Unit};
use super::store::Patch;
use super::tuning;

/// How a matrix product is cut: a cube makes `m × n` elements from blocks of `k` summed ones, a unit `unit_m × unit_n`.
///
/// `unit_n` and `k` are multiples of 4, and a cube has as many units as divide the vectors of 4 of both blocks evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub(crate) m: u32,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) unit_m: u32,
    pub(crate) unit_n: u32,
}

impl Tile {
    pub(crate) fn units(&self) -> u32 {
        self.units_m() * self.units_n()
    }

    pub(crate) fn units_m(&self) -> u32 {
        self.m / self.unit_m
    }

    pub(crate) fn units_n(&self) -> u32 {
        self.n / self.unit_n
    }

    /// A row of sums of every unit, for stores whose words hold sums of several.
    pub(crate) fn patch(&self) -> Patch {
        Patch { rows: self.units_m(), columns: self.n, row: self.n, units: self.units() }
    }

    /// Cubes for a product.
    pub(crate) fn cubes(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.m as usize) * n.div_ceil(self.n as usize)
    }
}

/// Few rows: most of the time goes into reading the other matrix.
const THIN: Tile = Tile { m: 16, n: 64, k: 32, unit_m: 2, unit_n: 4 };

/// For devices with thousands of units, as long as there are cubes for all of them.
const LARGE: Tile = Tile { m: 128, n: 128, k: 16, unit_m: 8, unit_n: 8 };
const MEDIUM: Tile = Tile { m: 64, n: 64, k: 16, unit_m: 4, unit_n: 4 };

/// For CPUs that pretend: few units that do much between two barriers.
const FEW_UNITS: Tile = Tile { m: 64, n: 64, k: 16, unit_m: 8, unit_n: 8 };

/// What is measured where calls are tuned.
pub(crate) const PRODUCTS: [Tile; 4] = [THIN, MEDIUM, LARGE, FEW_UNITS];

/// The tile for a product of `m × n` elements.
pub(crate) fn choose<R: Runtime>(call: &Call<'_, R>, m: usize, n: usize) -> Tile {
    let client = call.client;
    if let Some(&tile) = call.choice.tile.and_then(|tile| PRODUCTS.get(tile as usize)) {
        return tile;
    }
    let hardware = &client.properties().hardware;
    if m <= THIN.m as usize * 2 {
        return THIN;
    }
    if is_cpu(client) {
        return FEW_UNITS;
    }
    let processors = hardware.num_streaming_multiprocessors.unwrap_or(16) as usize;
    if LARGE.cubes(m, n) >= processors { LARGE } else { MEDIUM }
}

/// Whether the device is a CPU that pretends to be a GPU: its planes are vectors.
pub(crate) fn is_cpu<R: Runtime>(client: &ComputeClient<R>) -> bool {
    client.properties().hardware.plane_size_max <= 8
}

/// Whether a kernel is cut into tiles.
pub(crate) fn has_tiles(kernel: &Kernel) -> bool {
    matches!(kernel, Kernel::Matmul(_) | Kernel::Conv(_) | Kernel::ConvTranspose(_) | Kernel::Attention(_))
}

/// Numbers of the tiles that a kernel with operands of some types may be cut into on a device.
pub(crate) fn tiles<R: Runtime>(
    client: &ComputeClient<R>,
    kernel: &Kernel,
    types: &[&TensorType],
    units: Option<&[MatrixUnit]>,
) -> Vec<u32> {
    if !has_tiles(kernel) {
        return Vec::new();
    }
    let (properties, hardware) = (client.properties(), &client.properties().hardware);
    let is_attention = matches!(kernel, Kernel::Attention(_));
    let multiplied = &types[..if is_attention { 3 } else { 2 }];
    let dtypes: Vec<DType> = multiplied.iter().map(|ty| ty.dtype).collect();
    let on_units = |unit: &Unit, tile: u32| match is_attention {
        true => tuning::tuned_attention(hardware, unit, types[0].shape[3], types[2].shape[3], Some(tile)).is_some(),
        false => tuning::tuned_product(hardware, unit, Some(tile)).is_some(),
    };
    if let Some(unit) = matrix_units::unit(properties, &dtypes, units) {
        let found: Vec<u32> = (0..tuning::ROWS).filter(|&tile| on_units(&unit, tile)).collect();
        if !found.is_empty() {
            return found;
        }
    }
    // A CPU takes seconds to compile a large tile, and has no use for it.
    match (is_attention, is_cpu(client)) {
        (true, false) => (0..ATTENTION.len() as u32).collect(),
        (false, false) => (0..PRODUCTS.len() as u32).collect(),
        (false, true) => vec![0, 3],
        (true, true) => Vec::new(),
    }
}

/// How attention is cut: a cube has `queries` queries, and makes `columns` columns of the result from blocks of `keys`
/// keys; head dims, and keys with their values, pass in chunks.
///
/// Units form a grid; each has as many queries, keys and columns as the grid leaves, the latter in multiples of 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Heads {
    pub(crate) queries: u32,
    pub(crate) keys: u32,
    pub(crate) columns: u32,
    pub(crate) chunk: u32,
    pub(crate) units_m: u32,
    pub(crate) units_n: u32,
}

impl Heads {
    pub(crate) fn units(&self) -> u32 {
        self.units_m * self.units_n
    }

    /// Vectors of 4 of a chunk of queries and keys, in rows with one more, or of a chunk of values.
    pub(crate) fn stage_vectors(&self) -> u32 {
        let scores = (self.queries + self.keys) * (self.chunk / 4 + 1);
        scores.max(self.chunk * self.columns / 4)
    }
}

const HEADS: Heads = Heads { queries: 64, keys: 64, columns: 128, chunk: 16, units_m: 16, units_n: 16 };
const HEADS_FEW_UNITS: Heads = Heads { queries: 32, keys: 64, columns: 128, chunk: 16, units_m: 8, units_n: 8 };

/// What is measured where calls are tuned.
pub(crate) const ATTENTION: [Heads; 2] = [HEADS, HEADS_FEW_UNITS];

/// The tile for heads with `e` columns.
pub(crate) fn heads<R: Runtime>(call: &Call<'_, R>, e: usize) -> Heads {
    let tuned = call.choice.tile.and_then(|tile| ATTENTION.get(tile as usize));
    let tile = *tuned.unwrap_or(if is_cpu(call.client) { &HEADS_FEW_UNITS } else { &HEADS });
    Heads { columns: if e <= 64 { 64 } else { 128 }, ..tile }
}

#[cfg(test)]
mod tests {
    use super::super::store::{PATCH_COLUMNS, PATCH_ROWS};
    use super::*;

    #[test]
    fn tiles_divide_evenly() {
        for tile in [THIN, LARGE, MEDIUM, FEW_UNITS] {
            let units = tile.units();
            assert_eq!((tile.unit_n % 4, tile.k % 4), (0, 0), "{tile:?}");
            assert_eq!((tile.m * tile.k / 4) % units, 0, "{tile:?}");
            assert_eq!((tile.n * tile.k / 4) % units, 0, "{tile:?}");
            // A unit loads the same summed elements of every row, see `gemm`.
            assert_eq!(units % (tile.k / 4), 0, "{tile:?}");
            // Units share the words of a patch, of the narrowest result, and lanes of words lie in one patch.
            let patch = tile.patch();
            assert_eq!(patch.rows * patch.columns / 4 % units, 0, "{tile:?}");
            assert_eq!((patch.rows % PATCH_ROWS, patch.columns % PATCH_COLUMNS), (0, 0), "{tile:?}");
            // Shared memory of 32 KB.
            let shared = (tile.m + tile.n) * (tile.k + 4) + patch.rows * patch.row;
            assert!(shared * 4 <= 32 << 10, "{tile:?}");
        }
    }

    #[test]
    fn tiles_of_attention_divide_evenly() {
        for (tile, columns) in [HEADS, HEADS_FEW_UNITS].into_iter().flat_map(|t| [(t, 64), (t, 128)]) {
            let tile = Heads { columns, ..tile };
            let units = tile.units();
            for extent in [tile.keys / 4, tile.columns / 4] {
                assert_eq!(extent % tile.units_n, 0, "{tile:?}");
            }
            for vectors in [tile.queries * tile.chunk / 4, tile.keys * tile.chunk / 4, tile.chunk * tile.columns / 4] {
                assert_eq!(vectors % units, 0, "{tile:?}");
            }
            assert_eq!((tile.queries % tile.units_m, tile.keys % tile.chunk), (0, 0), "{tile:?}");
            assert_eq!((units % tile.queries, tile.keys / 4 % (units / tile.queries)), (0, 0), "{tile:?}");
            let shared = 16 * (tile.stage_vectors() + tile.queries * (tile.keys / 4 + 1)) + 4 * (units + tile.queries);
            assert!(shared <= 32 << 10, "{tile:?}");
        }
    }
}
