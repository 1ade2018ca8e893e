package guest

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// gateways starts an etcd, nodes and two gateways on the host.
func gateways(t testing.TB, nodes int) [2]*role {
	t.Helper()
	dir := t.TempDir()
	clients, peers := "http://"+freeAddr(t), "http://"+freeAddr(t)
	launch(t, "etcd", "--data-dir", filepath.Join(dir, "etcd"), "--listen-client-urls", clients, "--advertise-client-urls", clients,
		"--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", "default="+peers)
	awaitListening(t, strings.TrimPrefix(clients, "http://"))
	for i := range nodes {
		id := fmt.Sprint(i + 1)
		firn(t, "node", "--json", "--id", id, "--disk", filepath.Join(dir, "node"+id)+"=20G", "--etcd", clients, "--listen", freeAddr(t), "--http", "")
	}
	var both [2]*role
	for i := range both {
		id := fmt.Sprint("gw", i+1)
		both[i] = firn(t, "gateway", "--json", "--id", id, "--data", filepath.Join(dir, id), "--etcd", clients, "--nbd", freeAddr(t), "--api", freeAddr(t), "--http", "")
	}
	return both
}

func awaitListening(t testing.TB, addr string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(quiet)
	for {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("nobody listens on %s", addr)
		}
	}
}

// TestGatewayKilled kills the gateway in use under a mounted file system that is
// written: the device moves to the other gateway, and back when that is stopped.
func TestGatewayKilled(t *testing.T) {
	both := gateways(t, scale(1, 3))
	both[0].command("volume", "create", "vol", "1G")
	g := storageGuest(t, Config{})
	g.Run("firn attach vol --gateway " + both[0].guestAddr() + "," + both[1].guestAddr())
	g.Run("mkfs.ext4 -q /dev/firn/vol; mount /dev/firn/vol /mnt")
	var jobs []*job
	for round := range scale(1, 3) {
		if a := g.theAttached(); a.Gateway != both[0].guestAddr() {
			t.Fatalf("before the kill: %+v", a)
		}
		j := g.fio(fmt.Sprint("killed", round), fmt.Sprint("/mnt/killed", round), mib(scale(8, 128)), "")
		j.Await(" IOPS]")
		both[0].kill()
		longest := j.done()
		a := g.theAttached()
		measured(t, "gateway killed under load: longest write %.2f s, device without a connection %.2f s (aim: at most 5 s)", longest.Seconds(), float64(a.Longest)/1000)
		if a.Gateway != both[1].guestAddr() || a.Moves != 1+2*round {
			t.Errorf("after the kill: %+v", a)
		}
		jobs = append(jobs, j)

		// An orderly stop hands the volume over.
		both[0] = both[0].again()
		j = g.fio(fmt.Sprint("stopped", round), fmt.Sprint("/mnt/stopped", round), mib(scale(8, 128)), "")
		j.Await(" IOPS]")
		both[1].signal(syscall.SIGTERM)
		longest = j.done()
		a = g.theAttached()
		measured(t, "gateway stopped under load: longest write %.2f s, longest time without a connection of both %.2f s (aim: under 1 s)", longest.Seconds(), float64(a.Longest)/1000)
		if a.Gateway != both[0].guestAddr() || a.Moves != 2+2*round {
			t.Errorf("after the stop: %+v", a)
		}
		jobs = append(jobs, j)
		<-both[1].exited
		both[1] = both[1].again()
	}
	g.Run("umount /mnt; e2fsck -fn /dev/firn/vol > /tmp/check 2>&1 || { cat /tmp/check; exit 1; }; mount /dev/firn/vol /mnt")
	for _, j := range jobs {
		j.again()
	}
	g.Run("umount /mnt; firn detach vol")
	g.cleanLog()
}
