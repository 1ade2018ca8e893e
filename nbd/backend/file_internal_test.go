package backend

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"firn.io/firn/nbd"
)

// TestFailedSyncIsFinal: after a sync that failed nothing is said to be durable,
// and nothing is written, whatever the file says later.
func TestFailedSyncIsFinal(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	b, err := NewFileBackend(f)
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, 4096)
	if _, err := b.WriteAt(page, 0); err != nil || b.Sync() != nil {
		t.Fatalf("a file that is well: %v", err)
	}
	well := b.sync
	b.sync = func() error { return syscall.EIO }
	if err := b.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("%v", err)
	}
	b.sync = well // as Linux does, which tells of an error once
	ctx := t.Context()
	_, write := b.WriteAt(page, 0)
	for what, err := range map[string]error{
		"sync": b.Sync(), "write": write, "FUA trim": b.Trim(ctx, 0, 4096, nbd.FUA), "trim": b.Trim(ctx, 0, 4096, 0),
		"zeroes": b.WriteZeroes(ctx, 0, 4096, 0), "FUA zeroes": b.WriteZeroes(ctx, 0, 4096, nbd.FUA), "no hole": b.WriteZeroes(ctx, 0, 4096, nbd.NoHole),
	} {
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%s after a failed sync: %v", what, err)
		}
	}
	if _, err := b.ReadAt(page, 0); err != nil {
		t.Errorf("read: %v", err)
	}
}
