package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// connectionsTo counts the guest's connections to a server.
func (g *Guest) connectionsTo(addr string) (n int) {
	g.t.Helper()
	for _, line := range strings.Split(g.Run("netstat -tn"), "\n") {
		if strings.Contains(line, addr) && strings.Contains(line, "ESTABLISHED") {
			n++
		}
	}
	return n
}

// stockClient is what a machine does that has nothing of Firn's.
func stockClient(t *testing.T, g *Guest, server *role) {
	host, port, _ := strings.Cut(server.guestAddr(), ":")
	g.Run(fmt.Sprintf("modprobe nbd; nbd-client -C 4 -N vol %s %s /dev/nbd0", host, port))
	if n := g.connectionsTo(server.guestAddr()); n != 4 {
		t.Errorf("%d connections, want 4", n)
	}
	j := g.fio("stock", "/dev/nbd0", mib(scale(4, 256)), "--iodepth=64")
	j.done()
	j.again()
	g.Run("mkfs.ext4 -q -F /dev/nbd0; mount /dev/nbd0 /mnt; dd if=/dev/urandom of=/mnt/f bs=1M count=4 conv=fsync 2>/dev/null; fstrim /mnt; umount /mnt; e2fsck -fn /dev/nbd0 >/dev/null 2>&1")
	g.Run("nbd-client -d /dev/nbd0")

	// By the driver's ioctls, which `firn attach` does not use.
	g.Run(fmt.Sprintf("nbd-client -L -N vol %s %s /dev/nbd0 >/dev/null 2>&1", host, port))
	g.Run("until [ $(blockdev --getsize64 /dev/nbd0) = 1073741824 ]; do usleep 50000; done; e2fsck -fn /dev/nbd0 >/dev/null 2>&1; nbd-client -d /dev/nbd0")
}

// several is a device of four connections, in the long variant with a server that
// is killed.
func several(t *testing.T, g *Guest, server *role) *role {
	g.Run("firn attach vol --connections 4 --request-time 3s --gateway " + server.guestAddr())
	if n := g.connectionsTo(server.guestAddr()); n < 4 || g.theAttached().Live != 4 {
		t.Errorf("%d connections, want 4: %+v", n, g.theAttached())
	}
	j := g.fio("several", "/dev/firn/vol", mib(scale(4, 256)), "--iodepth=64")
	if long {
		j.Await(" IOPS]")
		server.kill()
		server = server.again()
	}
	longest := j.done()
	j.again()
	a := g.theAttached()
	measured(t, "four connections: longest write %.2f s, device without a connection %.2f s", longest.Seconds(), float64(a.Longest)/1000)
	if a.Live != 4 || long && a.Reconnects < 4 {
		t.Errorf("not all are connected: %+v", a)
	}
	g.Run("firn detach vol")
	return server
}

// patient fails unless the one device with one connection is set so that requests
// wait, and the kernel looks after them.
func (g *Guest) patient() {
	g.t.Helper()
	if ms := g.Run("cat /sys/block/" + strings.TrimPrefix(g.theAttached().Device, "/dev/") + "/queue/io_timeout"); ms != "2000" {
		g.t.Errorf("the kernel looks after requests every %s ms", ms)
	}
	if out, exit := g.Try("grep -E 'not taken back|do not wait|repeated late' /run/firn/attach/*.log"); exit == 0 {
		g.t.Errorf("the process could not tell the kernel:\n%s", out)
	}
}

// adopt kills the process that keeps a device: first alone, then with the server.
func adopt(t *testing.T, g *Guest, server *role) *role {
	attach := "firn attach vol --gateway " + server.guestAddr()
	device := g.Run(attach)
	g.Run("mkfs.ext4 -q -F /dev/firn/vol; mount /dev/firn/vol /mnt")
	j := g.fio("adopt", "/mnt/f", mib(scale(10, 256)), "")
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
	g.patient()
	g.Run("umount /mnt; e2fsck -fn /dev/firn/vol >/dev/null 2>&1; firn detach vol")
	return server
}

// pressure writes through the page cache while nearly all memory is taken, and
// has the connection made anew: what writes the device back needs no memory that
// only that would free.
func pressure(t *testing.T, g *Guest, server *role) *role {
	g.Run("firn attach vol --gateway " + server.guestAddr() + "; mkfs.ext4 -q -F /dev/firn/vol; mount /dev/firn/vol /mnt")
	pid := g.theAttached().PID
	const leftMiB = 36
	g.Run(fmt.Sprintf(`mkdir -p /eaten; mount -t tmpfs -o size=100%% eaten /eaten; sync; echo 3 > /proc/sys/vm/drop_caches
		available=$(awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo); dd if=/dev/zero of=/eaten/f bs=1M count=$((available-%d)) 2>/dev/null`, leftMiB))
	j := g.fio("pressure", "/mnt/f", mib(scale(32, 512)), "--direct=0 --bs=64k")
	j.Await(" IOPS]")
	server.kill()
	server = server.again()
	j.done()
	measured(t, "written back with %s MiB available", g.Run("awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo"))
	if a := g.theAttached(); a.PID != pid || !a.Kept || a.Reconnects == 0 {
		t.Errorf("after the pressure: %+v, the process was %d", a, pid)
	}
	g.Run("umount /eaten; umount /mnt; e2fsck -fn /dev/firn/vol >/dev/null 2>&1; firn detach vol")
	return server
}

// secured is a device whose server requires TLS and knows its client: the process
// that keeps it carries the data. It is killed, and so is the server.
func secured(t *testing.T, g *Guest) {
	dir := t.TempDir()
	key, cert := filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	// One certificate is the authority, the server's and the client's.
	out, err := exec.Command("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
		"-subj", "/CN=firn", "-addext", "subjectAltName=IP:"+HostAddr, "-keyout", key, "-out", cert).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl: %v\n%s", err, out)
	}
	g.copy(key, "/etc/key.pem")
	g.copy(cert, "/etc/cert.pem")
	server := up(t, "--volume", "tls=256M", "--nbd-tls-cert", cert, "--nbd-tls-key", key, "--nbd-tls-ca", cert)
	if out, exit := g.Try("firn attach tls --gateway " + server.guestAddr()); exit == 0 || !strings.Contains(out, "TLS") {
		t.Errorf("in the clear: exit %d, %s", exit, out)
	}
	attach := "cd /etc; firn attach tls --tls-ca cert.pem --tls-cert cert.pem --tls-key key.pem --gateway " + server.guestAddr()
	device := g.Run(attach)
	g.Run("mkfs.ext4 -q -F /dev/firn/tls; mount /dev/firn/tls /mnt")
	j := g.fio("tls", "/mnt/f", mib(scale(8, 128)), "")
	j.Await(" IOPS]")
	server.kill()
	server = server.again()
	g.Run(fmt.Sprint("kill -9 ", g.theAttached().PID))
	if at := g.Run(attach); at != device {
		t.Errorf("attached again as %s, was %s", at, device)
	}
	longest := j.done()
	j.again()
	measured(t, "TLS, server killed and restarted, then the process: longest write %.2f s", longest.Seconds())
	g.Run("umount /mnt; e2fsck -fn /dev/firn/tls >/dev/null 2>&1; firn detach tls")
}

// copy puts a text file of the host into the guest.
func (g *Guest) copy(from, to string) {
	g.t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		g.t.Fatal(err)
	}
	g.Run(fmt.Sprintf("cat > %s <<'END'\n%sEND\n", to, text))
}
