from instavm_guest.agent import main

main()
