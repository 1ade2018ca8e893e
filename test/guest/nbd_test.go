package guest

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// jobLimit is far above what a job takes that makes progress.
const jobLimit = 4 * time.Minute

// job is a run of fio whose data is verified.
type job struct {
	*Running
	t    testing.TB
	file string
	args string
}

// fio writes all of size bytes, in random order, each once a loop, and then reads
// and verifies them, past the page cache.
func (g *Guest) fio(name, file, size string, more string) *job {
	g.t.Helper()
	j := &job{t: g.t, file: "/tmp/" + name + ".json"}
	j.args = fmt.Sprintf("fio --name=%s --filename=%s --size=%s --rw=randwrite --bs=16k --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --end_fsync=1 --randseed=%d %s",
		name, file, size, len(name)*7919, more)
	if !long {
		j.args += " --rate_iops=,150" // so that what happens meanwhile meets the writes
	}
	j.Running = g.Start(j.args + " --output=" + j.file + " --output-format=json --eta=always --eta-newline=1s")
	return j
}

// done waits for the end of a job without any error and returns its longest write.
func (j *job) done() time.Duration {
	j.t.Helper()
	begin := time.Now()
	err := j.wait(quiet, func() bool { return j.ended || time.Since(begin) > jobLimit })
	if err != nil || !j.Ended() {
		log, _ := j.g.Try("tail -n 20 /run/firn/attach/*.log; firn attach ls")
		j.t.Fatalf("fio did not end within %v: %v\n%s\n%s\n%s", jobLimit, err, j.Output(), log, j.g.Console(20))
	}
	out, exit := j.Wait()
	text := j.g.Run("cat " + j.file)
	var result struct {
		Jobs []struct {
			Error int
			Write struct {
				Lat struct{ Max float64 } `json:"clat_ns"`
				N   int64                 `json:"total_ios"`
			}
			Read struct {
				N int64 `json:"total_ios"`
			}
		}
	}
	at := strings.Index(text, "{")
	if exit != 0 || at < 0 {
		j.t.Fatalf("fio: exit %d\n%s\n%s\n%s", exit, out, text, j.g.Console(20))
	}
	if err := json.Unmarshal([]byte(text[at:]), &result); err != nil || len(result.Jobs) != 1 {
		j.t.Fatalf("fio printed %q: %v", text, err)
	}
	r := result.Jobs[0]
	if r.Error != 0 || r.Write.N == 0 || r.Read.N == 0 {
		j.t.Fatalf("fio: error %d, %d writes, %d verifying reads", r.Error, r.Write.N, r.Read.N)
	}
	return time.Duration(r.Write.Lat.Max)
}

// again verifies what the job has written, once more, and writes nothing.
func (j *job) again() {
	j.t.Helper()
	j.g.Run("echo 3 > /proc/sys/vm/drop_caches; " + j.args + " --verify_only --output=/dev/null")
}

// attached is an attachment as `firn attach ls --json` shows it.
type attached struct {
	Volume     string
	Device     string
	Backend    string
	Gateway    string
	Kept       bool
	Live       int
	Size       int64 `json:"size_bytes"`
	Reconnects int
	Moves      int
	Longest    int64 `json:"longest_down_ms"`
	PID        int
}

func (g *Guest) attached() []attached {
	g.t.Helper()
	var all []attached
	if err := json.Unmarshal([]byte(g.Run("firn attach ls --json")), &all); err != nil {
		g.t.Fatal(err)
	}
	return all
}

// theAttached returns the one volume that is attached.
func (g *Guest) theAttached() attached {
	g.t.Helper()
	all := g.attached()
	if len(all) != 1 {
		g.t.Fatalf("%d volumes are attached: %+v", len(all), all)
	}
	return all[0]
}

// cleanLog fails if the kernel saw an I/O error.
func (g *Guest) cleanLog() {
	g.t.Helper()
	out, _ := g.Try(`dmesg | grep -iE "I/O error|EXT4-fs error|XFS.*(error|shutdown|corrupt)|Buffer I/O|hung task|blocked for more" | grep -v "^$"`)
	if out != "" {
		g.t.Errorf("the kernel complains:\n%s", out)
	}
}

// scale is how much larger the long variants are.
func scale(short, longer int) int {
	if long {
		return longer
	}
	return short
}

func mib(n int) string { return strconv.Itoa(n) + "m" }

// TestNBD is one boot of everything that one server can show.
func TestNBD(t *testing.T) {
	server := up(t, "--volume", "vol=1G", "--volume", "small=64M")
	boot := storageGuest(t, Config{CPUs: 4})
	gateway := server.guestAddr()
	each := func(name string, f func(t *testing.T, g *Guest)) {
		t.Run(name, func(t *testing.T) {
			g := boot.With(t)
			t.Cleanup(func() {
				if t.Failed() { // the next begins as if it had not been
					g.Try("umount /mnt; firn detach vol; firn detach small; firn detach tls; nbd-client -d /dev/nbd0; umount /eaten; dmesg -c")
				}
			})
			f(t, g)
			g.cleanLog()
		})
	}

	each("once", func(t *testing.T, g *Guest) {
		first := g.Run("firn attach vol --gateway " + gateway)
		second := g.Run("firn attach vol --gateway " + gateway)
		if first != second || len(g.attached()) != 1 {
			t.Errorf("attached twice: %s and %s, %+v", first, second, g.attached())
		}
		a := g.theAttached()
		if sys := g.Run("cat /sys/block/" + strings.TrimPrefix(a.Device, "/dev/") + "/backend"); sys != a.Backend || len(sys) != 36 {
			t.Errorf("backend %q, want the UUID %q", sys, a.Backend)
		}
		if link := g.Run("readlink -f /dev/firn/vol"); link != a.Device {
			t.Errorf("/dev/firn/vol is %s, want %s", link, a.Device)
		}
		if out := g.Run("firn attach udev " + strings.TrimPrefix(a.Device, "/dev/")); !strings.HasPrefix(out, "FIRN_VOLUME=vol\n") {
			t.Errorf("udev is told %q", out)
		}
		g.Run("mkfs.ext4 -q -F /dev/firn/vol; mount /dev/firn/vol /mnt")
		if out, exit := g.Try("firn detach vol"); exit != 5 || !strings.Contains(out, "mounted at /mnt") {
			t.Errorf("detach of a mounted device: exit %d, %s", exit, out)
		}
		g.Run("umount /mnt; firn detach " + a.Device)
		if len(g.attached()) != 0 || len(g.Run("ls /dev/firn")) != 0 {
			t.Error("detached, and still there")
		}
		if out, exit := g.Try("firn attach nosuch --gateway " + gateway); exit != 3 {
			t.Errorf("a volume that is not there: exit %d, %s", exit, out)
		}
		if out, exit := g.Try("firn attach vol --gateway " + HostAddr + ":1"); exit != 6 {
			t.Errorf("a gateway that is not there: exit %d, %s", exit, out)
		}
	})

	each("discard", func(t *testing.T, g *Guest) {
		g.Run("firn attach vol --gateway " + gateway + "; dd if=/dev/urandom of=/dev/firn/vol bs=1M seek=500 count=8 conv=fsync 2>/dev/null; blkdiscard /dev/firn/vol")
		if sum := g.Run("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/firn/vol bs=1M skip=500 count=8 2>/dev/null | tr -d '\\0' | wc -c"); sum != "0" {
			t.Errorf("%s bytes are not zero after blkdiscard", sum)
		}
		g.Run("mkfs.ext4 -q -F /dev/firn/vol; mount /dev/firn/vol /mnt; dd if=/dev/urandom of=/mnt/f bs=1M count=32 conv=fsync 2>/dev/null; rm /mnt/f; sync")
		if out := g.Run("fstrim -v /mnt"); !strings.Contains(out, "trimmed") || strings.Contains(out, " 0 B") {
			t.Errorf("fstrim: %s", out)
		}
		g.Run("umount /mnt; e2fsck -fn /dev/firn/vol >/dev/null 2>&1; firn detach vol")
	})

	each("resize", func(t *testing.T, g *Guest) {
		g.Run("firn attach small --gateway " + gateway + "; mkfs.ext4 -q -F /dev/firn/small; mount /dev/firn/small /mnt")
		j := g.fio("grow", "/mnt/f", "8m", "--loops="+strconv.Itoa(scale(1, 20)))
		server.command("volume", "resize", "small", "256M")
		g.Run("for i in $(seq 300); do [ $(blockdev --getsize64 /dev/firn/small) = 268435456 ] && exit 0; usleep 100000; done; echo the device did not grow; firn attach ls; exit 1")
		g.Run("resize2fs /dev/firn/small >/dev/null 2>&1")
		j.done()
		j.again()
		if kib, err := strconv.Atoi(g.Run("df -k /mnt | tail -1 | awk '{print $2}'")); err != nil || kib < 200<<10 {
			t.Errorf("the file system has %d KiB: %v", kib, err)
		}
		g.Run("umount /mnt; e2fsck -fn /dev/firn/small >/dev/null 2>&1; firn detach small")
	})

	each("restart", func(t *testing.T, g *Guest) {
		g.Run("firn attach vol --gateway " + gateway + "; mkfs.xfs -q -f /dev/firn/vol; mount /dev/firn/vol /mnt")
		j := g.fio("restart", "/mnt/f", mib(scale(12, 512)), "")
		j.Await(" IOPS]")
		server.kill()
		server = server.again()
		longest := j.done()
		a := g.theAttached()
		measured(t, "server killed and restarted under load: longest write %.2f s, device without a connection %.2f s", longest.Seconds(), float64(a.Longest)/1000)
		if over := longest - time.Duration(a.Longest)*time.Millisecond; over > 5*time.Second {
			t.Errorf("what was in flight was repeated %v after there was a connection again", over)
		}
		if a.Reconnects == 0 || a.Live != 1 {
			t.Errorf("nothing was reconnected: %+v", a)
		}
		g.patient()
		g.Run("umount /mnt; mount /dev/firn/vol /mnt")
		j.again()
		g.Run("umount /mnt; xfs_repair -n /dev/firn/vol >/tmp/check 2>&1 || { cat /tmp/check; exit 1; }; firn detach vol")
	})

	each("stock", func(t *testing.T, g *Guest) { stockClient(t, g, server) })
	each("several", func(t *testing.T, g *Guest) { server = several(t, g, server) })
	each("adopt", func(t *testing.T, g *Guest) { server = adopt(t, g, server) })
	each("tls", secured)
	each("pressure", func(t *testing.T, g *Guest) { server = pressure(t, g, server) })
}
