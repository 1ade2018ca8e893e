package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"firn.io/firn/nbd/wire"
	"firn.io/firn/test/stamp"
)

// smallFileSystem mounts a file system of so many bytes, in memory.
func smallFileSystem(t testing.TB, dir string, size int64) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", size), "tmpfs", dir)
	t.Cleanup(func() {
		if r := try(t, "umount", dir); r.exit != 0 {
			try(t, "umount", "-l", dir)
			t.Errorf("umount %s: %s", dir, r.stderr)
		}
	})
	return dir
}

// mib writes, reads and trims whole MiB with stamps.
type mib struct {
	history *stamp.History
	dev     stamp.Device
}

const mibSectors = 1 << 20 / stamp.SectorBytes

func (m mib) write(ctx context.Context, i int64) error {
	p := make([]byte, 1<<20)
	w := m.history.Begin(1, i*mibSectors, mibSectors, p)
	err := m.dev.WriteAt(ctx, p, i<<20)
	if err != nil {
		w.Unknown()
		return err
	}
	w.Acked()
	return nil
}

func (m mib) trim(ctx context.Context, i int64) error {
	w := m.history.Begin(1, i*mibSectors, mibSectors, nil)
	err := m.dev.Trim(ctx, i<<20, 1<<20)
	if err != nil {
		w.Unknown()
		return err
	}
	w.Acked()
	return nil
}

func (m mib) check(ctx context.Context, i int64) error {
	p := make([]byte, 1<<20)
	r := m.history.BeginRead(i * mibSectors)
	if err := m.dev.ReadAt(ctx, p, i<<20); err != nil {
		r.Failed()
		return err
	}
	return r.Check(p)
}

// TestFullDisks fills three nodes on small file systems with one volume: at the
// end there is ENOSPC and nothing else, what was acknowledged is there, and room
// that is given back can be used again.
func TestFullDisks(t *testing.T) {
	const size = 640 << 20
	ctx := t.Context()
	c := &cluster{t: t, dir: t.TempDir()}
	c.etcd, c.etcdURL = startEtcd(t, filepath.Join(c.dir, "etcd"))
	var disks [3]string
	for i := range c.nodes {
		disks[i] = smallFileSystem(t, filepath.Join(c.dir, fmt.Sprintf("disk%d", i+1)), size)
		c.args[i] = []string{"node", "--json", "--id", fmt.Sprint(i + 1), "--disk", disks[i], "--etcd", c.etcdURL, "--listen", freeAddr(t), "--http", freeAddr(t)}
		c.startNode(i)
	}
	c.gateway = serve(t, []string{"gateway", "--json", "--id", "gw1", "--data", filepath.Join(c.dir, "gw1"), "--etcd", c.etcdURL,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	c.gateway.firn("volume", "create", "v", "4G")
	m := mib{stamp.NewHistory([16]byte{}), roam(t, "v", c.gateway.NBD)}

	begin, filled := time.Now(), int64(0)
	for ; ; filled++ {
		if err := m.write(ctx, filled); errors.Is(err, wire.ENOSPC) {
			break
		} else if err != nil {
			t.Fatalf("write of MiB %d: %v", filled, err)
		}
	}
	measured(t, "%d MiB written to file systems of %d MiB until ENOSPC, in %.1f s", filled, size>>20, time.Since(begin).Seconds())
	if filled < size>>20/4 || filled > size>>20 {
		t.Errorf("%d MiB could be written", filled)
	}
	for i := range filled {
		if err := m.check(ctx, i); err != nil {
			t.Fatalf("MiB %d of a full disk: %v", i, err)
		}
	}
	for i := range filled / 2 {
		if err := m.trim(ctx, i); err != nil {
			t.Fatalf("trim of MiB %d on a full disk: %v", i, err)
		}
	}
	begin = time.Now()
	for i := range filled / 4 {
		awaitTrue(t, "room", func() bool {
			err := m.write(ctx, i)
			if err != nil && !errors.Is(err, wire.ENOSPC) {
				t.Fatalf("write of MiB %d after a trim: %v", i, err)
			}
			return err == nil
		})
	}
	measured(t, "half of it trimmed and half of that written again: %.1f s", time.Since(begin).Seconds())

	// A node starts again from a disk that was full, and without another one
	// what it holds is a whole volume.
	if err := c.nodes[0].stop(); err != nil {
		t.Errorf("stop: %v\n%s", err, lastLines(c.nodes[0].stderr.String()))
	}
	c.startNode(0)
	c.awaitCaughtUp(0)
	c.nodes[1].kill()
	for i := range filled {
		if err := m.check(ctx, i); err != nil {
			t.Fatalf("MiB %d: %v", i, err)
		}
	}
}

// hog takes all that is free in a file system, to the last byte.
func hog(t testing.TB, name string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for piece := make([]byte, 1<<20); len(piece) > 0; {
		if _, err := f.Write(piece); errors.Is(err, syscall.ENOSPC) {
			piece = piece[:len(piece)/2]
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// TestFileSystemFilledByOthers: somebody else fills the file system of one node's
// disk to the last byte. Writes end in ENOSPC, reads go on; the node, killed, starts
// in the full file system and serves what it has; and once the file is gone, writes
// go on by themselves.
func TestFileSystemFilledByOthers(t *testing.T) {
	ctx := t.Context()
	c := &cluster{t: t, dir: t.TempDir()}
	c.etcd, c.etcdURL = startEtcd(t, filepath.Join(c.dir, "etcd"))
	mount := smallFileSystem(t, filepath.Join(c.dir, "small"), 1<<30)
	disks := [3]string{filepath.Join(mount, "disk"), filepath.Join(c.dir, "disk2"), filepath.Join(c.dir, "disk3")}
	for i := range c.nodes {
		c.args[i] = []string{"node", "--json", "--id", fmt.Sprint(i + 1), "--disk", disks[i] + "=1G", "--etcd", c.etcdURL, "--listen", freeAddr(t), "--http", freeAddr(t)}
		c.startNode(i)
	}
	c.gateway = serve(t, []string{"gateway", "--json", "--id", "gw1", "--data", filepath.Join(c.dir, "gw1"), "--etcd", c.etcdURL,
		"--nbd", freeAddr(t), "--api", freeAddr(t), "--http", freeAddr(t)})
	c.gateway.firn("volume", "create", "v", "4G")
	m := mib{stamp.NewHistory([16]byte{}), roam(t, "v", c.gateway.NBD)}

	written := int64(0)
	for ; written < 64; written++ {
		if err := m.write(ctx, written); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(mount, "somebody-else")
	hog(t, other)
	for ; ; written++ {
		if err := m.write(ctx, written); errors.Is(err, wire.ENOSPC) {
			break
		} else if err != nil || written == 1<<10 {
			t.Fatalf("write of MiB %d: %v", written, err)
		}
		hog(t, other) // and whatever becomes free
	}
	if s := c.gateway.firn("status"); !strings.Contains(s, "file system") {
		t.Errorf("status says nothing of the file system:\n%s", s)
	}
	check := func(when string) {
		t.Helper()
		for i := range written {
			if err := m.check(ctx, i); err != nil {
				t.Fatalf("%s: MiB %d: %v", when, i, err)
			}
		}
	}
	check("in a full file system")
	c.nodes[0].kill()
	hog(t, other)
	begin := time.Now()
	c.startNode(0)
	c.awaitCaughtUp(0)
	measured(t, "%d MiB written until ENOSPC; start in a full file system: %.1f s", written, time.Since(begin).Seconds())
	c.nodes[1].kill()
	check("after a start in a full file system, without another node")
	c.startNode(1)
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	awaitTrue(t, "room", func() bool {
		err := m.write(ctx, written)
		if err != nil && !errors.Is(err, wire.ENOSPC) {
			t.Fatal(err)
		}
		return err == nil
	})
	written++
	check("after all")
}
