package guest

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// connectionsTo counts the guest's connections to a server.
func (g *Guest) connectionsTo(addr string) int {
	g.t.Helper()
	return strings.Count(g.Run("netstat -tn"), addr)
}

// stockClient is what a machine does that has nothing of Firn's.
func stockClient(t *testing.T, g *Guest, server *role) {
	host, port, _ := strings.Cut(server.guestAddr(), ":")
	g.Run(fmt.Sprintf("nbd-client -C 4 -N vol %s %s /dev/nbd0", host, port))
	if n := g.connectionsTo(server.guestAddr()); n != 4 {
		t.Errorf("%d connections, want 4", n)
	}
	j := g.fio("stock", "/dev/nbd0", mib(scale(8, 256)), "--size="+mib(scale(8, 256))+" --iodepth=64")
	j.done()
	j.again()
	g.Run("mkfs.ext4 -q -F /dev/nbd0; mount /dev/nbd0 /mnt; dd if=/dev/urandom of=/mnt/f bs=1M count=4 conv=fsync 2>/dev/null; fstrim /mnt; umount /mnt; e2fsck -fn /dev/nbd0 >/dev/null 2>&1")
	g.Run("nbd-client -d /dev/nbd0")

	// By the driver's ioctls, which `firn attach` does not use.
	g.Run(fmt.Sprintf("nbd-client -L -N vol %s %s /dev/nbd0 >/dev/null 2>&1", host, port))
	g.Run("until [ $(blockdev --getsize64 /dev/nbd0) = 1073741824 ]; do usleep 50000; done; e2fsck -fn /dev/nbd0 >/dev/null 2>&1; nbd-client -d /dev/nbd0")
}

// several is a device of four connections whose server is killed.
func several(t *testing.T, g *Guest, server *role) *role {
	g.Run("firn attach vol --connections 4 --request-time 3s --gateway " + server.guestAddr())
	if n := g.connectionsTo(server.guestAddr()); n != 4 {
		t.Errorf("%d connections, want 4", n)
	}
	j := g.fio("several", "/dev/firn/vol", mib(scale(12, 256)), "--iodepth=64")
	j.Await(" IOPS]")
	server.kill()
	server = server.again()
	longest := j.done()
	j.again()
	a := g.theAttached()
	measured(t, "server killed and restarted under four connections: longest write %.2f s, device without a connection %.2f s", longest.Seconds(), float64(a.Longest)/1000)
	if a.Live != 4 || a.Reconnects < 4 {
		t.Errorf("not all are connected again: %+v", a)
	}
	g.Run("firn detach vol")
	return server
}

// adopt kills the process that keeps a device: first alone, then with the server.
func adopt(t *testing.T, g *Guest, server *role) *role {
	attach := "firn attach vol --gateway " + server.guestAddr()
	device := g.Run(attach)
	g.Run("mkfs.ext4 -q -F /dev/firn/vol; mount /dev/firn/vol /mnt")
	j := g.fio("adopt", "/mnt/f", mib(scale(16, 256)), "")
	j.Await(" IOPS]")
	// A server that takes its time keeps its connection.
	server.signal(syscall.SIGSTOP)
	g.Run("sleep 6")
	server.signal(syscall.SIGCONT)
	if a := g.theAttached(); a.Reconnects != 0 || a.Live != 1 {
		t.Errorf("the server did nothing for 6 s: %+v", a)
	}
	again := func() {
		t.Helper()
		if at := g.Run(attach); at != device {
			t.Errorf("attached again as %s, was %s", at, device)
		}
	}
	kill := func() {
		t.Helper()
		before := g.theAttached()
		g.Run(fmt.Sprint("kill -9 ", before.PID))
		if a := g.theAttached(); a.Kept || a.Device != device {
			t.Errorf("the process was killed: %+v", a)
		}
	}
	kill()
	again()
	kill()
	server.kill()
	server = server.again()
	again()
	j.done()
	j.again()
	g.Run("for i in $(seq 100); do firn attach ls --json | grep -q '\"live\": 1' && exit 0; usleep 100000; done; firn attach ls; exit 1")
	if a := g.theAttached(); !a.Kept || a.Device != device {
		t.Errorf("adopted: %+v", a)
	}
	g.Run("umount /mnt; e2fsck -fn /dev/firn/vol >/dev/null 2>&1; firn detach vol")
	return server
}

// pressure writes through the page cache while nearly all memory is taken, and
// has the connection made anew: what writes the device back needs no memory that
// only that would free.
func pressure(t *testing.T, g *Guest, server *role) *role {
	g.Run("firn attach vol --gateway " + server.guestAddr() + "; mkfs.ext4 -q -F /dev/firn/vol; mount /dev/firn/vol /mnt")
	pid := g.theAttached().PID
	const leftMiB = 56
	g.Run(fmt.Sprintf(`mkdir -p /eaten; mount -t tmpfs -o size=100%% eaten /eaten; sync; echo 3 > /proc/sys/vm/drop_caches
		available=$(awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo); dd if=/dev/zero of=/eaten/f bs=1M count=$((available-%d)) 2>/dev/null`, leftMiB))
	j := g.fio("pressure", "/mnt/f", mib(scale(96, 512)), "--direct=0 --bs=64k")
	j.Await(" IOPS]")
	server.kill()
	server = server.again()
	j.done()
	measured(t, "written back with %s MiB available", g.Run("awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo"))
	if a := g.theAttached(); a.PID != pid || !a.Kept || a.Reconnects == 0 {
		t.Errorf("after the pressure: %+v, the process was %d", a, pid)
	}
	g.Run("umount /eaten")
	j.again()
	g.Run("umount /mnt; e2fsck -fn /dev/firn/vol >/dev/null 2>&1; firn detach vol")
	return server
}

// TestPowerCut: a machine whose power fails comes back, attaches, and finds what
// it had synced; the second time it goes down in order, and nothing is to recover.
func TestPowerCut(t *testing.T) {
	server := up(t, "--volume", "vol=256M")
	attach := "firn attach vol --wait 1m --gateway " + server.guestAddr()
	g := storageGuest(t, Config{})
	g.Run(attach + "; mkfs.ext4 -q /dev/firn/vol; mount /dev/firn/vol /mnt")
	sum := g.Run("dd if=/dev/urandom of=/mnt/synced bs=1M count=4 conv=fsync 2>/dev/null; sync; md5sum < /mnt/synced")
	g.Start("while true; do dd if=/dev/urandom of=/mnt/more bs=64k count=64 conv=fsync 2>/dev/null; echo written; done").Await("written")
	g.Kill()

	g = storageGuest(t, Config{})
	g.Run(attach + "; mount /dev/firn/vol /mnt")
	if got := g.Run("md5sum < /mnt/synced"); got != sum {
		t.Errorf("synced before the power cut: %s, after it: %s", sum, got)
	}
	// As the unit orders it: first the mount ends, then the device.
	g.Run("echo more >> /mnt/synced; umount /mnt; firn detach vol")
	g.Run(attach)
	if out := g.Run("dumpe2fs -h /dev/firn/vol 2>/dev/null"); strings.Contains(out, "needs_recovery") || !strings.Contains(out, "Filesystem state:         clean") {
		t.Errorf("after an orderly end:\n%s", out)
	}
	g.Run("e2fsck -fn /dev/firn/vol >/dev/null 2>&1; firn detach vol")
	g.cleanLog()
}
