package node_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/index/pebblestore"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport/inproc"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
)

// fingerprint is the checksum of every file of a disk's folder but its lock.
func fingerprint(t *testing.T, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "LOCK" {
			return err
		}
		p, err := os.ReadFile(name)
		sums[strings.TrimPrefix(name, dir)] = fmt.Sprintf("%x", sha256.Sum256(p))
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return sums
}

// changed names the files of a folder that differ from what they were.
func changed(t *testing.T, dir string, before map[string]string) (names []string) {
	t.Helper()
	after := fingerprint(t, dir)
	for name, sum := range before {
		if after[name] != sum {
			names = append(names, name)
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			names = append(names, "new "+name)
		}
	}
	return names
}

// edit changes the content of a file.
func edit(t *testing.T, name string, change func(p []byte) []byte) {
	t.Helper()
	p, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, change(p), 0o644); err != nil {
		t.Fatal(err)
	}
}

// files returns those of a folder that match a pattern; there must be some.
func files(t *testing.T, dir, pattern string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(names) == 0 {
		t.Fatalf("%s in %s: %v, %v", pattern, dir, names, err)
	}
	return names
}

// editSuperblock changes what disk.json says, with a checksum that is right.
func editSuperblock(t *testing.T, dir, field string, value any) {
	edit(t, filepath.Join(dir, "disk.json"), func(p []byte) []byte {
		line, _, _ := bytes.Cut(p, []byte("\n"))
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatal(err)
		}
		m[field] = value
		line, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		line = append(line, '\n')
		return fmt.Appendf(line, "%08x\n", block.CRC(line))
	})
}

// eachHeader changes the batch headers of a disk's log, from docs/format/seglog.md.
func eachHeader(t *testing.T, dir string, change func(header []byte)) {
	for _, name := range files(t, dir, "log/*.seg") {
		edit(t, name, func(p []byte) []byte {
			for at := 0; at+block.Size <= len(p); at += block.Size {
				if binary.LittleEndian.Uint32(p[at:]) == 0x4c4e5246 {
					change(p[at:])
				}
			}
			return p
		})
	}
}

// sealHeader makes the checksum of a header that was changed right.
func sealHeader(h []byte) {
	area := h[:binary.LittleEndian.Uint32(h[72:])]
	binary.LittleEndian.PutUint32(area[124:], 0)
	binary.LittleEndian.PutUint32(area[124:], block.CRC(area))
}

// editIndex changes records of a disk's index.
func editIndex(t *testing.T, dir string, change func(set func(key, value []byte), key, value []byte)) {
	t.Helper()
	s, err := pebblestore.Open(filepath.Join(dir, "index"), pebblestore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	b := s.NewBatch()
	snap := s.Snapshot()
	it, err := snap.Iterate([]byte{0}, []byte{0xff})
	if err != nil {
		t.Fatal(err)
	}
	for ok := it.Seek([]byte{0}); ok; ok = it.Next() {
		change(b.Set, it.Key(), it.Value())
	}
	it.Close()
	snap.Close()
	if err := s.Commit(b); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func flip(p []byte, at int) { p[at] ^= 0xff }

// kept are the files of a disk that hold something: all but what Pebble notes at
// each start.
func kept(name string) bool {
	return !strings.HasPrefix(name, "/index/") || strings.HasSuffix(name, ".sst")
}

// newPairs is a lab of three nodes with two disks each.
func newPairs(t *testing.T, age time.Duration) *lab {
	l := &lab{t: t, ctx: context.Background(), cluster: block.NewUUID(), meta: meta.NewMem(clock.System{}), fabric: inproc.NewFabric(nil), capacity: 64 << 20, age: age}
	l.add(3, func(m *machine) { m.second = t.TempDir() })
	return l
}

// diskAt is what a node says of the disk in a folder.
func (m *machine) diskAt(dir string) node.DiskStatus {
	s, _ := node.Snapshot(m.loop, m.node)
	for _, d := range s.Disks {
		if d.Dir == dir {
			return d
		}
	}
	m.t.Fatalf("node %d has no disk in %s", m.id, dir)
	panic("not reached")
}

// data are writes that must be readable.
type data struct {
	a    *attached
	want map[block.Chunk][]byte
}

func (d *data) write(seed int) {
	for ch := range block.Chunk(12) {
		d.want[ch] = pattern(seed+int(ch), 8)
		d.a.write(ch, 0, d.want[ch])
	}
}

// check reads every chunk from a node that has it.
func (d *data) check(t *testing.T) {
	t.Helper()
	for ch, p := range d.want {
		q := d.a.request(wire.ReqRead, ch)
		q.Count = uint16(len(p) / block.Size)
		if got := d.a.c.must(q, nil); !bytes.Equal(got.data, p) {
			t.Errorf("chunk %d is wrong", ch)
		}
	}
}

// TestBadDiskIsLeftOut: a disk that is not what it should be is left out at the
// start, with what, why and what to do; nothing on it is written; the node's
// other disk goes on; and it is in use again once it has been put right.
func TestBadDiskIsLeftOut(t *testing.T) {
	t.Parallel()
	l := newPairs(t, 100*time.Millisecond)
	d := &data{newClient(l).attach(l.volume("demo", 64<<20), 1), map[block.Chunk][]byte{}}
	d.write(0)
	m := l.nodes[1]
	if m.diskAt(m.dir).Replicas == 0 || m.diskAt(m.second).Replicas == 0 {
		t.Fatal("a disk has no replicas")
	}
	m.stop()
	whole := t.TempDir()
	if err := os.CopyFS(whole, os.DirFS(m.dir)); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		t.Helper()
		if err := os.RemoveAll(m.dir); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(m.dir, os.DirFS(whole)); err != nil {
			t.Fatal(err)
		}
	}
	superblock := filepath.Join(m.dir, "disk.json")
	spoil := func(pattern string, change func(p []byte) []byte) func(*testing.T) {
		return func(t *testing.T) {
			for _, name := range files(t, m.dir, pattern) {
				edit(t, name, change)
			}
		}
	}
	remove := func(pattern string) func(*testing.T) {
		return func(t *testing.T) {
			for _, name := range files(t, m.dir, pattern) {
				if err := os.RemoveAll(name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, tc := range []struct {
		name     string
		spoil    func(t *testing.T)
		why, act string
	}{
		{"superblock: a bit", spoil("disk.json", func(p []byte) []byte { flip(p, 20); return p }), "fails its checksum", "put it back"},
		{"superblock: empty", spoil("disk.json", func([]byte) []byte { return nil }), "fails its checksum", "put it back"},
		{"superblock: gone", remove("disk.json"), "no disk.json", "put its disk.json back"},
		{"superblock: newer format", func(t *testing.T) { editSuperblock(t, m.dir, "format", 9) }, "format 9", "start the build of Firn that wrote it"},
		{"disk of another node", func(t *testing.T) { editSuperblock(t, m.dir, "node", 7) }, "disk of node 7", "another folder"},
		{"disk of another cluster", func(t *testing.T) {
			editSuperblock(t, m.dir, "cluster", block.ClusterID(block.NewUUID()).String())
		}, "disk of cluster", "give another folder"},
		{"something else", func(t *testing.T) {
			remove("*")(t)
			if err := os.WriteFile(filepath.Join(m.dir, "holiday.jpg"), []byte("data"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, "holiday.jpg", "give an empty folder"},
		{"folder gone", func(t *testing.T) {
			if err := os.RemoveAll(m.dir); err != nil {
				t.Fatal(err)
			}
		}, "is gone", "mount the disk"},
		{"not a folder", func(t *testing.T) {
			if err := errors.Join(os.RemoveAll(m.dir), os.WriteFile(m.dir, nil, 0o644)); err != nil {
				t.Fatal(err)
			}
		}, "not a directory", "look whether it is a folder"},
		{"log: newer format", func(t *testing.T) {
			eachHeader(t, m.dir, func(h []byte) { h[4] = 2; sealHeader(h) })
		}, "format 2 of the log", "start the build of Firn that wrote it"},
		{"log: newer format, from somewhere on", func(t *testing.T) {
			n := 0
			eachHeader(t, m.dir, func(h []byte) {
				if n++; n > 5 {
					h[4] = 2
					sealHeader(h)
				}
			})
		}, "format 2 of the log", "start the build of Firn that wrote it"},
		{"log: all headers", func(t *testing.T) { eachHeader(t, m.dir, func(h []byte) { flip(h, 60) }) }, "rotted", "replace the disk"},
		{"log: first header", func(t *testing.T) {
			n := 0
			eachHeader(t, m.dir, func(h []byte) {
				if n++; n == 1 {
					flip(h, 60)
				}
			})
		}, "rotted", "Replace the disk"},
		{"log: gone", remove("log"), "was removed", "put it back"},
		{"log: first segment gone", remove("log/00000001.seg"), "was removed", "put it back"},
		{"index: newer format", func(t *testing.T) {
			editIndex(t, m.dir, func(set func(k, v []byte), k, v []byte) {
				if len(k) == 5 && len(v) == 4 {
					set(k, []byte{9, 0, 0, 0})
				}
			})
		}, "its format is 09000000", "start the build of Firn that wrote it"},
		{"index: newer format of the tables", func(t *testing.T) {
			names := files(t, m.dir, "index/marker.format-version.*")
			if err := os.Rename(names[0], filepath.Join(m.dir, "index/marker.format-version.000099.999")); err != nil {
				t.Fatal(err)
			}
		}, "format", "start the build of Firn that wrote it"},
		{"index: manifest", spoil("index/MANIFEST-*", func(p []byte) []byte { flip(p, len(p)/2); return p }), "damaged", "replace the disk"},
		{"index: name of the manifest", remove("index/marker.manifest.*"), "is gone", "replace the disk"},
		{"index: bits of the tables", spoil("index/*.sst", func(p []byte) []byte {
			for i := 0; i < len(p)/2; i += 64 {
				flip(p, i)
			}
			return p
		}), "checksum", "replace the disk"},
		{"index: footers of the tables", spoil("index/*.sst", func(p []byte) []byte { flip(p, len(p)-20); return p }), "footer", "replace the disk"},
		{"index: tables gone", remove("index/*.sst"), "does not exist", "replace the disk"},
		{"index: tables short", spoil("index/*.sst", func(p []byte) []byte { return p[:len(p)/2] }), "damaged", "replace the disk"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.spoil(t)
			before := fingerprint(t, m.dir)
			m.start()
			got := m.diskAt(m.dir)
			if !strings.Contains(got.Failed, tc.why) || !strings.Contains(got.Failed, tc.act) || strings.Contains(got.Failed, "\n") {
				t.Errorf("the disk is left out for %q; want %q and %q", got.Failed, tc.why, tc.act)
			}
			if got.Health.State != wire.DiskFailed || got.Health.Reason != got.Failed {
				t.Errorf("health %+v", got.Health)
			}
			l.eventually("the node's other disk works", func() bool {
				s, _ := node.Snapshot(m.loop, m.node)
				open := 0
				for _, r := range s.Replicas {
					if r.Open && r.Leader != 0 {
						open++
					}
				}
				return s.Registered && open > 0 && open == m.diskAt(m.second).Replicas
			})
			m.stop()
			for _, name := range changed(t, m.dir, before) {
				if kept(strings.TrimPrefix(name, "new ")) {
					t.Errorf("%s was changed", name)
				}
			}
			restore()
		})
	}
	superblocks := fingerprint(t, m.dir)["/disk.json"]
	m.start()
	if got := m.diskAt(m.dir); got.Failed != "" || got.Replicas == 0 {
		t.Fatalf("after it was put right: %+v", got)
	}
	l.eventually("its replicas follow", func() bool {
		s, _ := node.Snapshot(m.loop, m.node)
		for _, r := range s.Replicas {
			if !r.Open || r.Leader == 0 || r.Failed != "" {
				return false
			}
		}
		return true
	})
	d.write(100)
	d.check(t)
	if p, err := os.ReadFile(superblock); err != nil || fmt.Sprintf("%x", sha256.Sum256(p)) != superblocks {
		t.Errorf("disk.json changed, %v", err)
	}
}

// TestNoUsableDisk: a node whose only disk is not its own does not start.
func TestNoUsableDisk(t *testing.T) {
	t.Parallel()
	l := newLab(t, 1)
	m := l.nodes[0]
	m.stop()
	editSuperblock(t, m.dir, "node", 7)
	if err := m.tryStart(); err == nil || block.KindOf(err) != block.Denied || !strings.Contains(err.Error(), "is a disk of node 7") {
		t.Errorf("start: %v", err)
	}
	editSuperblock(t, m.dir, "node", 1)
	m.start()
	other := &machine{t: t, lab: l, id: 1, dir: m.dir}
	if err := other.tryStart(); err == nil || block.KindOf(err) != block.Busy || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a second process on one folder: %v", err)
	}
}

// TestDiskRemovedWhileInUse: its node notices, the disk is out for good, its
// replicas are filled elsewhere, and the other disk goes on.
func TestDiskRemovedWhileInUse(t *testing.T) {
	t.Parallel()
	l := newPairs(t, time.Hour) // nothing but a look at the folder shows it
	d := &data{newClient(l).attach(l.volume("demo", 64<<20), 1), map[block.Chunk][]byte{}}
	d.write(0)
	m := l.nodes[1]
	if err := os.RemoveAll(m.dir); err != nil {
		t.Fatal(err)
	}
	l.eventually("the disk is out", func() bool { return strings.Contains(m.diskAt(m.dir).Failed, "are gone while it was in use") })
	d.write(100)
	d.check(t)
	l.eventually("its replicas are on the other disk", func() bool {
		s, _ := node.Snapshot(m.loop, m.node)
		for _, r := range s.Replicas {
			if !r.Open || r.Leader == 0 {
				return false
			}
		}
		return len(s.Replicas) == 6
	})
	m.stop()
	m.start() // with the folder still gone
	if got := m.diskAt(m.dir).Failed; !strings.Contains(got, "is gone") || !strings.Contains(got, "mount the disk") {
		t.Errorf("after a start: %q", got)
	}
	if _, err := os.Stat(m.dir); !os.IsNotExist(err) {
		t.Errorf("the folder was made anew: %v", err)
	}
	d.check(t)
}

// TestRottenBlock: a block that rotted is answered as corrupt, never with other
// bytes; other replicas have it.
func TestRottenBlock(t *testing.T) {
	t.Parallel()
	l := newLab(t, 3)
	d := &data{newClient(l).attach(l.volume("demo", 64<<20), 1), map[block.Chunk][]byte{}}
	d.write(0)
	m := l.nodes[1]
	m.stop()
	for _, name := range files(t, m.dir, "log/*.seg") {
		edit(t, name, func(p []byte) []byte {
			for _, want := range d.want {
				if at := bytes.Index(p, want); at >= 0 {
					flip(p, at+100)
				}
			}
			return p
		})
	}
	m.start()
	for ch := range d.want {
		q := d.a.request(wire.ReqRead, ch)
		q.Count = 8
		l.eventually("the read is answered", func() bool {
			got, ok := d.a.c.ask(m.id, q, nil)
			return ok && got.resp.Status == wire.StatusCorrupt
		})
	}
	if got := m.diskAt(m.dir).Health.Corrupt; got == 0 {
		t.Error("nothing was counted")
	}
	for ch, want := range d.want {
		if got := d.a.read(1, ch, 0, 8); !bytes.Equal(got, want) {
			t.Errorf("chunk %d is wrong on node 1", ch)
		}
	}
}
