package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// diskUsage is what the files below dir take, in bytes.
func diskUsage(t testing.TB, dir string) int64 {
	t.Helper()
	var total int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		total += info.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// TestOverwritingDoesNotGrow overwrites a volume ten times in random order on a
// disk that is a fraction of what was written: segments are collected.
func TestOverwritingDoesNotGrow(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const capacity = 1 << 30
	s := up(t, dir+"/data", "--capacity", "1G", "--volume", "v=256M")
	run(t, "fio", "--name=over", "--ioengine=nbd", "--uri="+s.uri("v"), "--rw=randwrite", "--bs=32k", "--size=256m", "--loops=10", "--iodepth=16",
		"--output="+dir+"/fio.txt")
	if report := run(t, "cat", dir+"/fio.txt"); !strings.Contains(report, "err= 0") {
		t.Fatalf("fio:\n%s", report)
	}
	used := diskUsage(t, dir+"/data/node-1")
	measured(t, "256 MiB overwritten 10 times takes %d MiB on a disk of %d MiB", used>>20, capacity>>20)
	if used > capacity*11/10 {
		t.Errorf("%d bytes on a disk of %d", used, int64(capacity))
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	s.again()
}
