package nbd_test

import (
	"context"
	"fmt"
	"net/http"
	_ "net/http/pprof"
	"os"
	"testing"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
)

// TestMain makes the test binary a server of a memory device when
// FIRN_NBD_TEST_SERVER names the address: benchmarks want the server's CPU time
// apart from the client's.
func TestMain(m *testing.M) {
	addr := os.Getenv("FIRN_NBD_TEST_SERVER")
	if addr == "" {
		os.Exit(m.Run())
	}
	dev := blocktest.New(blocktest.Options{Bytes: 1 << 30, Name: "vol", NoLending: os.Getenv("FIRN_NBD_TEST_NO_LENDING") != ""})
	l, err := nbd.Listen(context.Background(), addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if pprof := os.Getenv("FIRN_NBD_TEST_PPROF"); pprof != "" {
		go http.ListenAndServe(pprof, nil)
	}
	fmt.Println(nbd.URI(l.Addr(), "vol"))
	fmt.Fprintln(os.Stderr, nbd.NewServer(nbd.Fixed{*nbd.DeviceExport(dev, nil)}, nbd.Options{}).Serve(l))
	os.Exit(1)
}

// shortDir is a temporary directory whose path fits a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
