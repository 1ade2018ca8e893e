package device_test

import (
	"testing"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/device"
)

// TestBlockSizes: what a volume's block size makes an export say.
func TestBlockSizes(t *testing.T) {
	for logical, want := range map[int]int{512: 0, 4096: 4096} {
		i := device.Info(block.Geometry{Name: "v", SizeBytes: 1 << 20, LogicalBlockBytes: logical, PreferredBytes: 4096, MaxBytes: 1 << 20, ReadOnly: true})
		if i.MinBlock != want || i.PreferredBlock != 4096 || i.MaxPiece != 1<<20 || !i.ReadOnly || !i.MultiConn || i.Bytes != 1<<20 {
			t.Errorf("%d: %+v", logical, i)
		}
	}
}
