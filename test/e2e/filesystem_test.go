package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// mountVolume makes the volume at uri a file by nbdfuse and mounts the file
// system on it through a loop device. unmount takes both away, also after the
// server has died under them.
func mountVolume(t testing.TB, uri, dir string, mkfs ...string) (root string, unmount func()) {
	t.Helper()
	fuse, root := filepath.Join(dir, "fuse"), filepath.Join(dir, "mnt")
	for _, d := range []string{fuse, root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	disk := exposeVolume(t, uri, fuse)
	if len(mkfs) > 0 {
		run(t, mkfs[0], append(mkfs[1:], disk)...)
	}
	run(t, "mount", "-o", "loop", disk, root)
	var done bool
	unmount = func() {
		if done {
			return
		}
		done = true
		if r := try(t, "umount", root); r.exit != 0 {
			try(t, "umount", "-l", root)
		}
		concealVolume(t, fuse)
	}
	t.Cleanup(unmount)
	return root, unmount
}

// exposeVolume makes the volume at uri the file disk in dir.
func exposeVolume(t testing.TB, uri, dir string) string {
	t.Helper()
	pidfile := dir + ".pid"
	os.Remove(pidfile)
	p := launch(t, "nbdfuse", "-P", pidfile, dir+"/disk", uri)
	p.awaitFile(pidfile)
	t.Cleanup(func() { concealVolume(t, dir) })
	return dir + "/disk"
}

func concealVolume(t testing.TB, dir string) {
	if r := try(t, "fusermount3", "-u", dir); r.exit != 0 {
		try(t, "fusermount3", "-uz", dir)
	}
}

// content is what file i holds.
func content(i int) []byte {
	p := make([]byte, 1000+i*7919%60000)
	rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), 7}).Read(p)
	return p
}

// writeSynced writes file i and syncs it and its folder.
func writeSynced(dir string, i int) error {
	f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content(i)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func TestFileSystemsSurviveKill(t *testing.T) {
	for _, fs := range []struct {
		name        string
		mkfs, check []string
		fine        string // exit codes of check that mean sound
	}{
		{"ext4", []string{"mkfs.ext4", "-q", "-F"}, []string{"e2fsck", "-f", "-p"}, " 0 1 "},
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}, []string{"xfs_repair", "-n"}, " 0 "},
	} {
		t.Run(fs.name, func(t *testing.T) {
			dir := t.TempDir()
			s := up(t, dir+"/data", "--nodes", "3", "--volume", "fs=512M")
			root, unmount := mountVolume(t, s.uri("fs"), dir+"/first", fs.mkfs...)

			// Files are written and synced until the server dies under them.
			synced := make(chan int)
			go func() {
				defer close(synced)
				for i := 0; writeSynced(root, i) == nil; i++ {
					synced <- i
				}
			}()
			last := -1
			for i := range synced {
				last = i
				if i == 60 {
					s.kill()
				}
			}
			if last < 60 {
				t.Fatalf("only %d files could be written", last+1)
			}
			unmount()
			s = s.again()

			if fs.name == "xfs" {
				// xfs_repair wants the log replayed, which mounting does.
				_, unmount := mountVolume(t, s.uri("fs"), dir+"/replay")
				unmount()
			}
			fuse := dir + "/check"
			if err := os.MkdirAll(fuse, 0o755); err != nil {
				t.Fatal(err)
			}
			disk := exposeVolume(t, s.uri("fs"), fuse)
			r := try(t, fs.check[0], append(fs.check[1:], disk)...)
			if !strings.Contains(fs.fine, fmt.Sprintf(" %d ", r.exit)) {
				t.Errorf("%v: exit %d\n%s%s", fs.check, r.exit, r.stdout, r.stderr)
			}
			concealVolume(t, fuse)

			root, unmount = mountVolume(t, s.uri("fs"), dir+"/second")
			for i := 0; i <= last; i++ {
				got, err := os.ReadFile(filepath.Join(root, fmt.Sprint(i)))
				if err != nil || !bytes.Equal(got, content(i)) {
					t.Errorf("synced file %d: %d bytes, %v", i, len(got), err)
				}
			}
			unmount()
			measured(t, "%s: %d synced files found after kill -9", fs.name, last+1)
			if err := s.stop(); err != nil {
				t.Errorf("stop: %v\n%s", err, s.stderr)
			}
		})
	}
}

// awaitFile returns once path exists.
func (p *process) awaitFile(path string) {
	p.t.Helper()
	// inotify on the folder, so that nothing polls.
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		p.t.Fatal(err)
	}
	watch := os.NewFile(uintptr(fd), "inotify")
	defer watch.Close()
	if _, err := syscall.InotifyAddWatch(fd, filepath.Dir(path), syscall.IN_CREATE|syscall.IN_CLOSE_WRITE|syscall.IN_MOVED_TO); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		<-p.exited
		watch.Close()
	}()
	buf := make([]byte, 4096)
	for {
		if info, err := os.Stat(path); err == nil && info.Size() > 0 {
			return
		}
		if _, err := watch.Read(buf); err != nil {
			p.t.Fatalf("%s ended before it made %s: %s%s", p.name, path, p.stdout, p.stderr)
		}
	}
}
